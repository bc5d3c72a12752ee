// Times moe_mlp without XLA:
//
//   bench_moe_mlp VARIANT[:COMPUTE][:TACTIC][,...] FORMAT f32|bf16 THREADS T... [-- H I E k]
//
// One layer (by default of Qwen3-30B-A3B), larger than the caches; contestants and numbers of
// tokens take turns, and every call has another routing. Prints the median time, the packed weight
// bytes of the experts touched per second, the arithmetic rate, and tokens per second: the median
// of the turns, and the mean ratio to the number of tokens before with its standard error.
// SECONDS_PER_CASE in the environment is 2 unless given; three turns are the least.
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <set>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "cpu/features.h"
#include "cpu/layout.h"
#include "cpu/moe_mlp.h"
#include "thread_pool.h"

namespace jaxmoe::cpu {
namespace {

using Random = std::mt19937;

// Of all threads: what a shared machine leaves comparable.
double cpu_seconds() {
  timespec now;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + static_cast<double>(now.tv_nsec) * 1e-9;
}

uint8_t* allocate(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) std::abort();
  if (std::getenv("NO_HUGE_PAGES") == nullptr) madvise(memory, bytes, MADV_HUGEPAGE);
  return static_cast<uint8_t*>(memory);
}

// Any codes; scales of moderate size.
uint8_t* random_weights(Format format, int64_t bytes, Random& random) {
  uint8_t* packed = allocate(static_cast<size_t>(bytes));
  for (int64_t i = 0; i < bytes; i += superblock_bytes(format)) {
    for (int b = 0; b < superblock_bytes(format); ++b) {
      const bool scale = b < scale_bytes(format);
      packed[i + b] = static_cast<uint8_t>(
          scale ? (format == Format::kNvfp4 ? 0x20 : 116) + random() % 8 : random());
    }
  }
  return packed;
}

// One of those that are compared.
struct Contestant {
  std::string label;
  const Kernels* kernels;
  Compute compute = Compute::kW4a16;
  Tactic tactic = Tactic::kAuto;
};

// A contestant at one number of tokens.
struct Case {
  const Contestant* contestant;
  int64_t tokens;
  std::vector<uint8_t> workspace = {};
  std::vector<double> times = {}, cpu_times = {};
  std::vector<double> rates = {};  // tokens per second of each turn
  double bytes = 0;                // of the experts that all calls together touched
};

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

double best(const std::vector<double>& values) {
  return *std::min_element(values.begin(), values.end());
}

// Of two cases' rates in the same turns: the mean ratio and its standard error.
std::pair<double, double> mean_ratio(const std::vector<double>& rates,
                                     const std::vector<double>& to) {
  const auto n = static_cast<double>(rates.size());
  double mean = 0, squares = 0;
  for (size_t i = 0; i < rates.size(); ++i) mean += rates[i] / to[i] / n;
  for (size_t i = 0; i < rates.size(); ++i) squares += std::pow(rates[i] / to[i] - mean, 2);
  return {mean, std::sqrt(squares / (n - 1) / n)};
}

struct Routing {
  std::vector<int32_t> ids;
  size_t experts = 0;
};

Routing random_routing(const MoeMlpShape& shape, Random& random) {
  Routing routing;
  std::set<int32_t> touched;
  for (int64_t t = 0; t < shape.tokens; ++t) {
    std::set<int32_t> chosen;
    while (static_cast<int64_t>(chosen.size()) < shape.top_k) {
      chosen.insert(static_cast<int32_t>(random() % shape.num_experts));
    }
    routing.ids.insert(routing.ids.end(), chosen.begin(), chosen.end());
    touched.insert(chosen.begin(), chosen.end());
  }
  routing.experts = touched.size();
  return routing;
}

// One call of `one`, with a routing of its own: weights that another call has just read would be
// in a cache. Returns its seconds.
double call(Case& one, MoeMlpArgs args, Executor* executor, Random& random, bool record) {
  args.shape.tokens = one.tokens;
  const Routing routing = random_routing(args.shape, random);
  args.expert_ids = routing.ids.data();
  args.kernels = one.contestant->kernels;
  args.compute = one.contestant->compute;
  args.tactic = one.contestant->tactic;
  args.workspace = one.workspace.data();
  const double cpu_start = cpu_seconds();
  const auto start = std::chrono::steady_clock::now();
  if (!moe_mlp(args, executor)) std::abort();
  const std::chrono::duration<double> time = std::chrono::steady_clock::now() - start;
  const double cpu_time = cpu_seconds() - cpu_start;
  if (record) {
    one.times.push_back(time.count());
    one.cpu_times.push_back(cpu_time);
    one.bytes += static_cast<double>(routing.experts) *
                 static_cast<double>(gate_up_bytes(args.format, args.activation, args.shape) +
                                     down_bytes(args.format, args.shape));
  }
  return time.count();
}

// Rounds: each number of tokens has a turn in each, and in a turn the contestants alternate. So
// neither two contestants nor two numbers of tokens are compared across a change of the machine.
// Turns are of one length, since the median of short ones misses the disturbances that every long
// one has.
void measure(const std::vector<Contestant>& contestants, MoeMlpArgs args,
             const std::vector<int64_t>& token_counts, Executor* executor, double seconds) {
  constexpr int kMinRounds = 3;
  Random random(1);
  const int64_t most = *std::max_element(token_counts.begin(), token_counts.end());
  const MoeMlpShape& shape = args.shape;
  std::vector<float> values(most * shape.hidden_size);
  for (float& value : values) value = std::uniform_real_distribution<float>(-1, 1)(random);
  std::vector<uint16_t> narrow(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    uint32_t bits;
    std::memcpy(&bits, &values[i], 4);
    narrow[i] = static_cast<uint16_t>(bits >> 16);
  }
  args.x = args.dtype == Dtype::kF32 ? static_cast<void*>(values.data()) : narrow.data();
  std::vector<float> out(values.size());
  args.out = out.data();
  std::vector<float> weights(most * shape.top_k, 1.0f / static_cast<float>(shape.top_k));
  args.weights = weights.data();

  double turn_seconds = 0.3;
  std::vector<Case> cases;  // the contestants of a number of tokens side by side
  for (const int64_t tokens : token_counts) {
    args.shape.tokens = tokens;
    for (const Contestant& one : contestants) {
      cases.push_back({&one, tokens});
      cases.back().workspace.resize(
          moe_mlp_workspace_bytes(*one.kernels, one.compute, args.dtype, args.shape));
      turn_seconds =
          std::max(turn_seconds, call(cases.back(), args, executor, random, /*record=*/false));
    }
  }
  const size_t side = contestants.size();
  double spent = 0;
  for (int round = 0; round < kMinRounds || spent < seconds * static_cast<double>(cases.size());
       ++round) {
    for (size_t first = 0; first < cases.size(); first += side) {
      std::vector<double> time(side, 0.0);
      double turn = 0;
      int calls = 0;
      do {
        for (size_t i = 0; i < side; ++i) {
          const double elapsed = call(cases[first + i], args, executor, random, /*record=*/true);
          time[i] += elapsed;
          turn += elapsed;
        }
        ++calls;
      } while (turn < 0.9 * turn_seconds * static_cast<double>(side));
      spent += turn;
      for (size_t i = 0; i < side; ++i) {
        cases[first + i].rates.push_back(static_cast<double>(cases[first + i].tokens * calls) /
                                         time[i]);
      }
    }
  }

  for (size_t i = 0; i < cases.size(); ++i) {
    const Case& one = cases[i];
    const double flops = 6.0 * static_cast<double>(one.tokens * shape.top_k * shape.hidden_size *
                                                   shape.intermediate_size);
    const double time = median(one.times);
    std::printf(
        "%-21s %s %s T=%-5ld median %9.3f ms  best %9.3f ms  cpu %9.3f ms (best %9.3f)  %6.1f GB/s "
        " %7.1f GFLOP/s  %8.1f tokens/s",
        one.contestant->label.c_str(), format_name(args.format),
        args.dtype == Dtype::kF32 ? "f32 " : "bf16", static_cast<long>(one.tokens), time * 1e3,
        best(one.times) * 1e3, median(one.cpu_times) * 1e3, best(one.cpu_times) * 1e3,
        one.bytes / static_cast<double>(one.times.size()) / time / 1e9, flops / time / 1e9,
        median(one.rates));
    if (i >= side) {
      const auto [ratio, error] = mean_ratio(one.rates, cases[i - side].rates);
      std::printf(" (x%.3f +- %.3f of T=%ld)", ratio, error,
                  static_cast<long>(cases[i - side].tokens));
    }
    std::printf("  (n=%zu in %zu turns, workspace %.1f MB)\n", one.times.size(), one.rates.size(),
                static_cast<double>(one.workspace.size()) / 1e6);
  }
}

// "VARIANT:COMPUTE:TACTIC"; false, with a message, if there is none or this machine cannot run it.
bool parse_contestant(const std::string& text, std::vector<Contestant>& contestants) {
  std::istringstream parts(text);
  std::string part;
  std::getline(parts, part, ':');
  const auto variant = parse_variant(part);
  bool known = variant.has_value();
  Contestant one = {text, nullptr};
  while (std::getline(parts, part, ':')) {
    const auto compute = parse_compute(part);
    const auto tactic = parse_tactic(part);
    one.compute = compute.value_or(one.compute);
    one.tactic = tactic.value_or(one.tactic);
    known = known && (compute || tactic);
  }
  if (!known) {
    std::fprintf(stderr, "%s: variants: %s; compute: %s; tactics: integer, stream, tiles\n",
                 text.c_str(), variant_names().c_str(), compute_names().c_str());
    return false;
  }
  if (const std::string reason = why_not(*variant); !reason.empty()) {
    std::fprintf(stderr, "%s\n", reason.c_str());
    return false;
  }
  one.kernels = kernels(*variant);
  const std::vector<Tactic> has = named_tactics(*one.kernels, one.compute);
  if (one.tactic != Tactic::kAuto && std::find(has.begin(), has.end(), one.tactic) == has.end()) {
    std::fprintf(stderr, "%s: %s has no tactic %s for compute %s\n", text.c_str(),
                 variant_name(*variant), tactic_name(one.tactic), compute_name(one.compute));
    return false;
  }
  contestants.push_back(std::move(one));
  return true;
}

int run(int argc, char** argv) {
  if (argc < 6 || std::string(argv[5]) == "--") {
    std::fprintf(stderr,
                 "usage: %s VARIANT[:COMPUTE][:TACTIC][,...] FORMAT f32|bf16 THREADS T... "
                 "[-- H I E k]\n",
                 argv[0]);
    return 2;
  }
  std::vector<Contestant> contestants;
  std::istringstream names(argv[1]);
  for (std::string name; std::getline(names, name, ',');) {
    if (!parse_contestant(name, contestants)) return 2;
  }
  const auto format = parse_format(argv[2]);
  if (!format) {
    std::fprintf(stderr, "formats: %s\n", format_names().c_str());
    return 2;
  }
  MoeMlpArgs args;
  args.format = *format;
  args.dtype = std::string(argv[3]) == "bf16" ? Dtype::kBf16 : Dtype::kF32;
  args.shape = {0, 2048, 768, 128, 8};
  std::vector<int64_t> token_counts;
  int i = 5;
  for (; i < argc && std::string(argv[i]) != "--"; ++i) token_counts.push_back(std::atol(argv[i]));
  if (i + 4 < argc) {
    args.shape = {0, std::atol(argv[i + 1]), std::atol(argv[i + 2]), std::atol(argv[i + 3]),
                  std::atol(argv[i + 4])};
  }
  const int64_t experts = args.shape.num_experts;
  Random random(7);
  args.gate_up = random_weights(
      args.format, experts * gate_up_bytes(args.format, args.activation, args.shape), random);
  args.down = random_weights(args.format, experts * down_bytes(args.format, args.shape), random);
  const std::vector<float> ones(experts, 1.0f);
  args.gate_up_global = args.down_global = ones.data();
  std::vector<float> params;
  for (const float value : {1.0f, 0.0f, 1e30f}) params.insert(params.end(), experts, value);
  args.activation_params = params.data();
  const char* budget = std::getenv("SECONDS_PER_CASE");
  ThreadPool pool(std::atoi(argv[4]));
  measure(contestants, args, token_counts, &pool, budget ? std::atof(budget) : 2.0);
  return 0;
}

}  // namespace
}  // namespace jaxmoe::cpu

int main(int argc, char** argv) { return jaxmoe::cpu::run(argc, argv); }
