// Tests of csrc/cpu without XLA: every tactic of every variant that this machine can run, in both
// kinds of arithmetic, against a plain f64 reference. Buffers are allocated to the byte, so that
// AddressSanitizer sees every overrun, and poisoned, so that a read of what nobody wrote turns into
// NaN.
//
//   test_cpu [VARIANT or TEST]...    test_cpu cpu_portable shapes routings
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <string>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#include "amx_model.h"
#include "cpu/features.h"
#include "cpu/grouped_matmul.h"
#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "cpu/moe_mlp.h"
#include "cpu/routing.h"
#include "reference.h"
#include "thread_pool.h"

namespace jaxmoe::cpu {
namespace {

using reference::Grid;
using reference::Random;

std::atomic<int> failures{0}, checks{0};  // some tests check on several threads

void expect(bool condition, const std::string& what) {
  ++checks;
  if (condition) return;
  ++failures;
  std::printf("FAILED: %s\n", what.c_str());
}

void expect_below(double value, double limit, const std::string& what) {
  expect(value <= limit, what + ": " + std::to_string(value) + " > " + std::to_string(limit));
}

// A table of kernels under test, by its own choice or by one tactic.
struct Kind {
  std::string label;
  const Kernels* table;
  Tactic tactic = Tactic::kAuto;

  // Whether the table has kernels for it.
  bool exists(Compute compute) const {
    const std::vector<Tactic> named = named_tactics(*table, compute);
    return tactic == Tactic::kAuto || std::find(named.begin(), named.end(), tactic) != named.end();
  }
  // Whether the handlers take it.
  bool suits(Compute compute, Dtype x, Dtype out) const {
    const bool any_dtype = tactic != Tactic::kInteger || compute == Compute::kW4a8;
    return exists(compute) && (any_dtype || (x == Dtype::kBf16 && out == Dtype::kBf16));
  }
};

constexpr float kPoison = std::numeric_limits<float>::quiet_NaN();

// A [rows, columns] matrix in f32 or bf16.
struct Buffer {
  Dtype dtype;
  std::vector<float> f32;
  std::vector<uint16_t> bf16;

  Buffer(Dtype type, int64_t size) : dtype(type) {
    if (dtype == Dtype::kF32) {
      f32.assign(size, kPoison);
    } else {
      bf16.assign(size, 0x7fc0);
    }
  }
  void set(int64_t i, float value) {
    if (dtype == Dtype::kF32) {
      f32[i] = value;
    } else {
      bf16[i] = reference::bf16_bits(reference::bf16_round(value));
    }
  }
  double get(int64_t i) const {
    return dtype == Dtype::kF32 ? f32[i] : reference::bf16_value(bf16[i]);
  }
  void* data() { return dtype == Dtype::kF32 ? static_cast<void*>(f32.data()) : bf16.data(); }
  std::vector<double> values(int64_t size) const {
    std::vector<double> all;
    for (int64_t i = 0; i < size; ++i) all.push_back(get(i));
    return all;
  }
};

struct Case {
  Format format = Format::kNvfp4;
  Dtype dtype = Dtype::kF32;
  Activation activation = Activation::kSwiglu;
  MoeMlpShape shape;
  Grid grid = Grid::kOrdinary;
  bool bias = true;
  bool weight_on_input = false;
  int64_t expert_offset = 0;
  enum Routing { kRandom, kHot, kDuplicates, kOutside } routing = kRandom;
  unsigned seed = 1;
  Compute compute = Compute::kW4a16;

  std::string name(const Kind& kind) const {
    return kind.label + " " + compute_name(compute) + " " + format_name(format) +
           (dtype == Dtype::kF32 ? " f32 " : " bf16 ") + activation_info(activation).name + " T" +
           std::to_string(shape.tokens) + " H" + std::to_string(shape.hidden_size) + " I" +
           std::to_string(shape.intermediate_size) + " E" + std::to_string(shape.num_experts) +
           " k" + std::to_string(shape.top_k) + " routing" + std::to_string(routing) + " seed" +
           std::to_string(seed);
  }
};

// The operands of a case, and its f64 result.
class Layer {
 public:
  explicit Layer(const Case& c)
      : case_(c),
        random_(c.seed),
        gated_(activation_info(c.activation).gated),
        gate_up_(reference::random_weights(c.format, c.shape.num_experts,
                                           c.shape.intermediate_size * (gated_ ? 2 : 1),
                                           c.shape.hidden_size, c.grid, random_)),
        down_(reference::random_weights(c.format, c.shape.num_experts, c.shape.hidden_size,
                                        c.shape.intermediate_size, c.grid, random_)),
        packed_gate_up_(gate_up_.pack(gated_)),
        packed_down_(down_.pack(false)),
        x_(c.dtype, c.shape.tokens * c.shape.hidden_size) {
    const MoeMlpShape& s = c.shape;
    double spread = 0;
    for (int64_t i = 0; i < s.hidden_size; ++i) spread += std::pow(gate_up_.value(0, 0, i), 2);
    for (int64_t i = 0; i < s.tokens * s.hidden_size; ++i) {
      x_.set(i, c.grid == Grid::kExact
                    ? static_cast<float>(static_cast<int>(random_() % 5) - 2)
                    : static_cast<float>(reference::uniform(random_, -4, 4) / std::sqrt(spread)));
    }
    const auto biases = [&](int64_t count) {
      std::vector<float> values;
      for (int64_t i = 0; c.bias && i < count; ++i) {
        values.push_back(c.grid == Grid::kExact
                             ? static_cast<float>(random_() % 4)
                             : static_cast<float>(reference::uniform(random_, -1, 1)));
      }
      return values;
    };
    gate_up_bias_ = biases(s.num_experts * gate_up_.n);
    down_bias_ = biases(s.num_experts * s.hidden_size);
    const double params[2][3] = {{1.702, 1.0, 7.0}, {4.0, 25.0, 0.0}};
    for (int p = 0; p < activation_info(c.activation).num_params; ++p) {
      for (int64_t e = 0; e < s.num_experts; ++e) {
        const double value = c.activation == Activation::kSwiglu       ? params[0][p]
                             : c.activation == Activation::kSwigluStep ? 7.0
                                                                       : params[1][p];
        // Not 0.125, for which a limit of 8.75 makes activations of 87.5: a tie for 8-bit integers.
        params_.push_back(static_cast<float>(value * (1 + 0.13 * static_cast<double>(e % 3))));
      }
    }
    for (int64_t t = 0; t < s.tokens; ++t) {
      for (int64_t j = 0; j < s.top_k; ++j) {
        int64_t id = static_cast<int64_t>(random_() % s.num_experts);
        if (c.routing == Case::kHot) id = j == 0 ? 0 : id;
        if (c.routing == Case::kDuplicates) id = t % s.num_experts;
        if (c.routing == Case::kOutside)
          id = static_cast<int64_t>(random_() % (3 * s.num_experts)) - s.num_experts;
        ids_.push_back(static_cast<int32_t>(id + c.expert_offset));
        weights_.push_back(c.grid == Grid::kExact
                               ? 0.5f
                               : static_cast<float>(reference::uniform(random_, 0.1, 1)));
      }
    }
    if (c.routing == Case::kOutside && !ids_.empty()) {
      ids_[0] = std::numeric_limits<int32_t>::min();
      ids_.back() = std::numeric_limits<int32_t>::max();
    }
  }

  Buffer& x() { return x_; }

  std::vector<double> expected() const {
    const MoeMlpShape& s = case_.shape;
    const int64_t rows = gate_up_.n, inner = s.intermediate_size;
    std::vector<double> out(s.tokens * s.hidden_size, 0.0);
    // Dequantised once: the reference would otherwise take minutes under a sanitizer.
    const auto dense = [](const reference::Weights& w) {
      std::vector<double> values;
      for (int64_t e = 0; e < w.experts; ++e) {
        for (int64_t r = 0; r < w.n; ++r) {
          for (int64_t i = 0; i < w.k; ++i) values.push_back(w.value(e, r, i));
        }
      }
      return values;
    };
    const std::vector<double> w1 = dense(gate_up_), w2 = dense(down_);
    std::vector<double> x = x_.values(s.tokens * s.hidden_size);
    if (case_.compute == Compute::kW4a8) reference::round_int8(x);
    for (int64_t t = 0; t < s.tokens; ++t) {
      for (int64_t j = 0; j < s.top_k; ++j) {
        const int64_t e = int64_t{ids_[t * s.top_k + j]} - case_.expert_offset;
        if (e < 0 || e >= s.num_experts) continue;
        const double weight = weights_[t * s.top_k + j];
        std::vector<double> y(rows), h(inner);
        for (int64_t r = 0; r < rows; ++r) {
          double sum = 0;
          for (int64_t i = 0; i < s.hidden_size; ++i) {
            sum += w1[(e * rows + r) * s.hidden_size + i] * x[t * s.hidden_size + i];
          }
          y[r] = sum * (case_.weight_on_input ? weight : 1.0) +
                 (case_.bias ? gate_up_bias_[e * rows + r] : 0.0);
        }
        double params[kMaxActivationParams] = {};
        for (int p = 0; p < activation_info(case_.activation).num_params; ++p) {
          params[p] = params_[p * s.num_experts + e];
        }
        for (int64_t i = 0; i < inner; ++i) {
          h[i] = reference::activate(case_.activation, y[i], gated_ ? y[inner + i] : 0.0, params);
        }
        if (case_.compute == Compute::kW4a8) reference::round_int8(h);
        for (int64_t n = 0; n < s.hidden_size; ++n) {
          double sum = case_.bias ? down_bias_[e * s.hidden_size + n] : 0.0;
          for (int64_t i = 0; i < inner; ++i) sum += w2[(e * s.hidden_size + n) * inner + i] * h[i];
          out[t * s.hidden_size + n] += sum * (case_.weight_on_input ? 1.0 : weight);
        }
      }
    }
    return out;
  }

  Buffer run(const Kind& kind, Executor* executor) {
    const MoeMlpShape& s = case_.shape;
    MoeMlpArgs args;
    args.kernels = kind.table;
    args.format = case_.format;
    args.compute = case_.compute;
    args.activation = case_.activation;
    args.dtype = case_.dtype;
    args.tactic = kind.tactic;
    args.shape = s;
    args.weight_on_input = case_.weight_on_input;
    args.expert_offset = case_.expert_offset;
    args.x = x_.data();
    args.gate_up = packed_gate_up_.data();
    args.gate_up_global = gate_up_.global.data();
    args.down = packed_down_.data();
    args.down_global = down_.global.data();
    args.gate_up_bias = case_.bias ? gate_up_bias_.data() : nullptr;
    args.down_bias = case_.bias ? down_bias_.data() : nullptr;
    args.activation_params = params_.data();
    args.expert_ids = ids_.data();
    args.weights = weights_.data();
    Buffer out(case_.dtype, s.tokens * s.hidden_size);
    args.out = out.data();
    // 0xff bytes are NaN as f32 and as bf16.
    const int64_t bytes = moe_mlp_workspace_bytes(*kind.table, case_.compute, case_.dtype, s);
    const std::unique_ptr<uint8_t[]> workspace(new uint8_t[bytes]);
    std::fill(workspace.get(), workspace.get() + bytes, 0xff);
    args.workspace = workspace.get();
    expect(
        packed_gate_up_.size() ==
            static_cast<size_t>(gate_up_bytes(case_.format, case_.activation, s) * s.num_experts),
        case_.name(kind) + ": gate_up_bytes");
    expect(packed_down_.size() == static_cast<size_t>(down_bytes(case_.format, s) * s.num_experts),
           case_.name(kind) + ": down_bytes");
    expect(moe_mlp(args, executor), case_.name(kind) + ": scratch memory");
    return out;
  }

 private:
  Case case_;
  Random random_;
  bool gated_;
  reference::Weights gate_up_, down_;
  std::vector<uint8_t> packed_gate_up_, packed_down_;
  Buffer x_;
  std::vector<float> gate_up_bias_, down_bias_, params_, weights_;
  std::vector<int32_t> ids_;
};

std::vector<Kind> tables;    // each by its own choice
std::vector<Kind> runnable;  // these, and each by each of its tactics

bool same_bits(const Buffer& a, const Buffer& b) {
  return a.bf16 == b.bf16 && a.f32.size() == b.f32.size() &&
         (a.f32.empty() ||
          std::memcmp(a.f32.data(), b.f32.data(), a.f32.size() * sizeof(float)) == 0);
}

// Sums in f32, which w4a8 rounds to 8-bit integers between the products: one in ten thousand then
// goes to the other side of a half. Or results in bf16.
double tolerance(Dtype dtype, Compute compute) {
  if (dtype == Dtype::kBf16) return 4e-3;
  return compute == Compute::kW4a8 ? 1e-3 : 3e-6;
}

void check_arithmetic(const Case& c) {
  Layer layer(c);
  const std::vector<double> want = layer.expected();
  ThreadPool pool(3);
  for (const Kind& kind : runnable) {
    if (!kind.suits(c.compute, c.dtype, c.dtype)) continue;
    const Buffer alone = layer.run(kind, nullptr);
    const Buffer together = layer.run(kind, &pool);
    const std::vector<double> got = alone.values(static_cast<int64_t>(want.size()));
    if (c.grid == Grid::kExact) {
      expect(got == want, c.name(kind) + ": exact");
    } else {
      expect_below(reference::relative_error(got, want), tolerance(c.dtype, c.compute),
                   c.name(kind));
    }
    expect(same_bits(alone, together), c.name(kind) + ": the same bits for 1 and 3 threads");
  }
}

// Every tactic of every variant and arithmetic against the reference, with 1 and 3 threads; same
// bits for both.
void check_moe_mlp(Case c) {
  for (const Compute compute : kComputes) {
    c.compute = compute;
    check_arithmetic(c);
  }
}

void test_activations() {
  for (int a = 0; a < kNumActivations; ++a) {
    for (const Format format : {Format::kNvfp4, Format::kMxfp4}) {
      for (const Dtype dtype : {Dtype::kF32, Dtype::kBf16}) {
        Case c;
        c.format = format;
        c.dtype = dtype;
        c.activation = static_cast<Activation>(a);
        c.shape = {11, 96, 96, 5, 3};
        check_moe_mlp(c);
      }
    }
  }
}

void test_shapes() {
  unsigned seed = 100;
  for (const MoeMlpShape shape :
       {MoeMlpShape{1, 64, 32, 4, 2}, MoeMlpShape{2, 32, 64, 3, 3}, MoeMlpShape{0, 64, 64, 2, 1},
        MoeMlpShape{37, 160, 224, 4, 2}, MoeMlpShape{600, 96, 32, 3, 2},
        MoeMlpShape{4, 352, 96, 1, 1}, MoeMlpShape{130, 64, 160, 2, 2},
        MoeMlpShape{5, 1056, 544, 2, 1}, MoeMlpShape{70, 352, 32, 1, 1},
        // more than a chunk of weights
        MoeMlpShape{97, 352, 32, 1, 1}, MoeMlpShape{97, 32, 352, 1, 1}}) {
    for (const Format format : {Format::kNvfp4, Format::kMxfp4}) {
      for (const Dtype dtype : {Dtype::kF32, Dtype::kBf16}) {
        Case c;
        c.shape = shape;
        c.format = format;
        c.dtype = dtype;
        c.seed = ++seed;
        c.bias = seed % 2;
        check_moe_mlp(c);
        c.activation = Activation::kRelu2;
        check_moe_mlp(c);
      }
    }
  }
  Case odd;  // NVFP4's block allows odd multiples of 16
  odd.shape = {9, 48, 80, 3, 2};
  check_moe_mlp(odd);
  odd.activation = Activation::kSilu;
  check_moe_mlp(odd);
}

void test_routings() {
  for (const auto routing : {Case::kHot, Case::kDuplicates, Case::kOutside}) {
    for (const Dtype dtype : {Dtype::kF32, Dtype::kBf16}) {
      Case c;
      c.routing = routing;
      c.dtype = dtype;
      c.shape = {70, 64, 96, 7, 3};
      c.expert_offset = routing == Case::kOutside ? 0 : 14;
      check_moe_mlp(c);
    }
  }
  Case c;
  c.weight_on_input = true;
  for (const Dtype dtype : {Dtype::kF32, Dtype::kBf16}) {
    c.dtype = dtype;
    c.shape = {40, 64, 64, 3, 1};
    check_moe_mlp(c);
  }
}

void test_exact() {
  for (const int64_t tokens : {3, 40}) {
    for (const Format format : {Format::kNvfp4, Format::kMxfp4}) {
      Case c;
      c.grid = Grid::kExact;
      c.format = format;
      c.activation = Activation::kRelu;
      c.shape = {tokens, 96, 64, 3, 2};
      check_moe_mlp(c);
    }
  }
}

// Large inputs must saturate the activations without a NaN, and a NaN row must stay alone.
void test_extremes(Compute compute) {
  // Its square times 64 weights is within what blocks of 8-bit integers hold, 2.6e33.
  const float large = compute == Compute::kW4a8 ? 1e13f : 1e15f;
  for (int a = 0; a < kNumActivations; ++a) {
    for (const int64_t tokens : {3, 40}) {
      Case c;
      c.compute = compute;
      c.activation = static_cast<Activation>(a);
      c.shape = {tokens, 64, 64, 2, 1};
      c.dtype = tokens == 3 ? Dtype::kF32 : Dtype::kBf16;
      Layer layer(c);
      std::vector<Kind> kinds;
      std::vector<Buffer> ordinary;
      for (const Kind& kind : runnable) {
        if (!kind.suits(compute, c.dtype, c.dtype)) continue;
        kinds.push_back(kind);
        ordinary.push_back(layer.run(kind, nullptr));
      }
      for (int64_t i = 0; i < 64; ++i) layer.x().set(64 + i, i % 2 ? large : -large / 10);
      for (const Kind& kind : kinds) {
        const Buffer out = layer.run(kind, nullptr);
        for (int64_t i = 64; i < 128; ++i)
          expect(!std::isnan(out.get(i)), c.name(kind) + ": NaN for large x");
      }
      for (int64_t i = 0; i < 64; ++i) layer.x().set(64 + i, kPoison);
      for (size_t v = 0; v < kinds.size(); ++v) {
        const Buffer out = layer.run(kinds[v], nullptr);
        for (int64_t i = 0; i < tokens * 64; ++i) {
          const bool own_row = i / 64 == 1;
          expect(own_row ? std::isnan(out.get(i)) : out.get(i) == ordinary[v].get(i),
                 c.name(kinds[v]) + ": a NaN row poisons itself and nothing else");
        }
      }
    }
  }
}

void test_extremes() {
  for (const Compute compute : kComputes) test_extremes(compute);
}

// Whatever the routing, the activations fit into the workspace, one behind the other, and their
// number of rows is that of the expert.
void test_segments(Compute compute) {
  Random random(3);
  for (const Kind& kind : runnable) {
    if (!kind.exists(compute)) continue;
    for (const Dtype dtype : {Dtype::kF32, Dtype::kBf16}) {
      SegmentRule rule = segment_rule(*kind.table, compute, dtype, true, kind.tactic);
      rule.hidden_columns = 192;
      rule.max_rows_f32 = 48;
      rule.max_rows = 256;
      for (int round = 0; round < 300; ++round) {
        const int64_t experts = 1 + random() % 9;
        const int64_t most = int64_t{1} << (random() % 10);
        std::vector<Segment> segments;
        int64_t rows = 0, offset = 0;
        for (int64_t e = 0; e < experts; ++e) {
          const int64_t own = random() % most;
          const size_t first = segments.size();
          offset = append_segments(rule, e, rows, own, offset, segments);
          int64_t cut = 0;
          for (size_t i = first; i < segments.size(); ++i) {
            const Segment& segment = segments[i];
            expect(segment.first_row == rows + cut && segment.rows > 0 &&
                       segment.hidden_offset % 64 == 0,
                   kind.label + ": segments follow each other");
            expect(kind.tactic == Tactic::kAuto || segment.form == rule.form(kind.tactic),
                   kind.label + ": every segment goes through the kernels of the tactic");
            cut += segment.rows;
          }
          expect(cut == own, kind.label + ": all rows of an expert are in its segments");
          rows += own;
        }
        expect(offset <= rule.hidden_bytes_bound(rows, experts),
               kind.label + ": activations fit into the workspace");
      }
    }
  }
}

void test_segments() {
  for (const Compute compute : kComputes) test_segments(compute);
}

void test_many_tokens_in_chunks() {
  Case c;
  c.shape = {9000, 32, 32, 5, 2};
  c.dtype = Dtype::kBf16;
  check_moe_mlp(c);
}

struct GroupedCase {
  Format format = Format::kNvfp4;
  Dtype x_dtype = Dtype::kF32, out_dtype = Dtype::kF32;
  int64_t rows, n, k, experts;
  std::vector<int32_t> sizes;
  int64_t offset = 0;
  Compute compute = Compute::kW4a16;
};

void check_grouped_arithmetic(const GroupedCase& c, std::string label);

void check_grouped(GroupedCase c, const std::string& label) {
  for (const Compute compute : kComputes) {
    c.compute = compute;
    check_grouped_arithmetic(c, label + " " + compute_name(compute));
  }
}

void check_grouped_arithmetic(const GroupedCase& c, std::string label) {
  Random random(5);
  const reference::Weights w =
      reference::random_weights(c.format, c.experts, c.n, c.k, Grid::kOrdinary, random);
  const std::vector<uint8_t> packed = w.pack(false);
  std::vector<float> bias;
  for (int64_t i = 0; i < c.experts * c.n; ++i)
    bias.push_back(static_cast<float>(reference::uniform(random, -1, 1)));
  Buffer x(c.x_dtype, c.rows * c.k);
  for (int64_t i = 0; i < c.rows * c.k; ++i)
    x.set(i, static_cast<float>(reference::uniform(random, -1, 1)));
  std::vector<double> want(c.rows * c.n, 0.0), values = x.values(c.rows * c.k);
  if (c.compute == Compute::kW4a8) reference::round_int8(values);
  int64_t row = 0;
  for (size_t g = 0; g < c.sizes.size(); ++g) {
    for (int32_t i = 0; i < c.sizes[g] && row < c.rows; ++i, ++row) {
      const int64_t e = static_cast<int64_t>(g) - c.offset;
      if (e < 0 || e >= c.experts) continue;
      for (int64_t n = 0; n < c.n; ++n) {
        double sum = bias[e * c.n + n];
        for (int64_t k = 0; k < c.k; ++k) sum += w.value(e, n, k) * values[row * c.k + k];
        want[row * c.n + n] = sum;
      }
    }
  }
  ThreadPool pool(3);
  for (const Kind& kind : runnable) {
    if (!kind.suits(c.compute, c.x_dtype, c.out_dtype)) continue;
    const auto run = [&](Executor* executor) {
      Buffer out(c.out_dtype, c.rows * c.n);
      GroupedMatmulArgs args;
      args.kernels = kind.table;
      args.tactic = kind.tactic;
      args.format = c.format;
      args.compute = c.compute;
      args.x_dtype = c.x_dtype;
      args.out_dtype = c.out_dtype;
      args.rows = c.rows;
      args.n = c.n;
      args.k = c.k;
      args.num_experts = c.experts;
      args.num_groups = static_cast<int64_t>(c.sizes.size());
      args.group_offset = c.offset;
      args.x = x.data();
      args.w = packed.data();
      args.w_global = w.global.data();
      args.bias = bias.data();
      args.group_sizes = c.sizes.data();
      args.out = out.data();
      expect(grouped_matmul(args, executor), label + ": scratch memory");
      return out;
    };
    const Buffer out = run(nullptr);
    const double limit = c.out_dtype == Dtype::kF32 ? 3e-6 : 4e-3;
    expect_below(reference::relative_error(out.values(c.rows * c.n), want), limit,
                 label + " " + kind.label);
    for (int64_t i = 0; i < c.rows * c.n; ++i) {
      if (want[i] == 0) expect(out.get(i) == 0, label + ": rows without a group are zero");
    }
    expect(same_bits(out, run(&pool)), label + ": the same bits for 1 and 3 threads");
  }
}

void test_grouped_matmul() {
  for (const Format format : {Format::kNvfp4, Format::kMxfp4}) {
    for (const Dtype x : {Dtype::kF32, Dtype::kBf16}) {
      for (const Dtype out : {Dtype::kF32, Dtype::kBf16}) {
        check_grouped({format, x, out, 50, 40, 96, 4, {3, 0, 20, 17}}, "grouped_matmul");
      }
    }
    for (const Dtype dtype : {Dtype::kF32, Dtype::kBf16}) {
      check_grouped({format, dtype, dtype, 300, 33, 64, 2, {280, 5}}, "grouped_matmul large group");
    }
    check_grouped({format, Dtype::kF32, Dtype::kF32, 20, 7, 32, 2, {4, 5, 6, 2}, 1},
                  "grouped_matmul offset");
    check_grouped({format, Dtype::kF32, Dtype::kF32, 20, 7, 32, 2, {4, 5, 6, 2}, -1},
                  "grouped_matmul offset -1");
    check_grouped({format, Dtype::kF32, Dtype::kF32, 20, 7, 32, 2, {4, 5}, 100},
                  "grouped_matmul offset 100");
    check_grouped({format, Dtype::kF32, Dtype::kF32, 10, 32, 64, 3, {-5, 2000000000, 2000000000}},
                  "grouped_matmul nonsense sizes");
    check_grouped({format, Dtype::kF32, Dtype::kF32, 0, 32, 64, 3, {0, 0, 0}},
                  "grouped_matmul no rows");
    check_grouped({format, Dtype::kF32, Dtype::kF32, 4, 32, 64, 3, {}}, "grouped_matmul no groups");
  }
}

// Each scale of each format, element by element: x is a unit vector, so that a product is one
// weight. Weights below f32's normal range may be flushed.
void test_every_scale() {
  for (const Format format : {Format::kNvfp4, Format::kMxfp4}) {
    const int block = format == Format::kNvfp4 ? 16 : 32;
    for (int byte = 0; byte < 256; ++byte) {
      if (format == Format::kNvfp4 ? (byte & 0x7f) == 0x7f : byte == 255) continue;  // NaN
      reference::Weights w = {format, 1, 32, block, {}, {}, {1.0f}};
      for (int i = 0; i < 32 * block; ++i)
        w.codes.push_back(static_cast<uint8_t>((i + i / block) % 16));
      w.scales.assign(32, static_cast<uint8_t>(byte));
      const std::vector<uint8_t> packed = w.pack(false);
      for (const int64_t rows : {1, 16, 20}) {  // each of the kernels
        for (const auto& [dtype, compute] : {std::pair{Dtype::kF32, Compute::kW4a16},
                                             {Dtype::kBf16, Compute::kW4a16},
                                             {Dtype::kBf16, Compute::kW4a8}}) {
          Buffer x(dtype, rows * block);
          for (int64_t i = 0; i < rows * block; ++i)
            x.set(i, i % block == i / block % block ? 1.0f : 0.0f);
          const std::vector<int32_t> sizes = {static_cast<int32_t>(rows)};
          for (const Kind& kind : runnable) {
            if (!kind.suits(compute, dtype, Dtype::kF32)) continue;
            Buffer out(Dtype::kF32, rows * 32);
            GroupedMatmulArgs args;
            args.kernels = kind.table;
            args.tactic = kind.tactic;
            args.format = format;
            args.compute = compute;
            args.x_dtype = dtype;
            args.rows = rows;
            args.n = 32;
            args.k = block;
            args.num_experts = args.num_groups = 1;
            args.x = x.data();
            args.w = packed.data();
            args.w_global = w.global.data();
            args.group_sizes = sizes.data();
            args.out = out.data();
            expect(grouped_matmul(args, nullptr), "scratch memory");
            for (int64_t r = 0; r < rows; ++r) {
              for (int64_t n = 0; n < 32; ++n) {
                const double want = w.value(0, n, r % block), got = out.get(r * 32 + n);
                // Beyond f32's range weights are infinite, and zeros of x times them NaN.
                if (format == Format::kMxfp4 && byte >= 253) continue;
                const bool flushed = std::abs(want) < std::ldexp(1.0, -126) && got == 0;
                const bool right = got == want || flushed;
                expect(right, right ? ""
                                    : kind.label + " " + compute_name(compute) + " " +
                                          format_name(format) + " scale byte " +
                                          std::to_string(byte) + ": got " + std::to_string(got) +
                                          ", want " + std::to_string(want));
              }
            }
          }
        }
      }
    }
  }
}

// The kernels on 16-bit integers, before anything is rounded to bf16: values of every size, a few
// of them large, and integers that must come out exactly.
void test_fixed() {
  enum { kNormal, kOutliers, kWhole };
  constexpr int64_t kColumns = 1088, kSuperblocks = kColumns / kSuperblockK;
  Random random(9);
  for (const Kind& kind : tables) {
    if (!kind.table->panel_fixed[0]) continue;
    for (const Format format : {Format::kNvfp4, Format::kMxfp4}) {
      for (const int values : {kNormal, kOutliers, kWhole}) {
        for (int rows = 1; rows <= 40; rows += 1 + rows / 5) {
          const Grid grid = values == kWhole ? Grid::kExact : Grid::kOrdinary;
          const reference::Weights w =
              reference::random_weights(format, 1, kPanelLanes, kColumns, grid, random);
          const std::vector<uint8_t> packed = w.pack(false);
          std::vector<float> x;
          for (int64_t i = 0; i < rows * kColumns; ++i) {
            const double size = values == kOutliers && i % 64 == 5 ? 30 : 1;
            const double normal = std::normal_distribution<double>(0, size)(random);
            x.push_back(static_cast<float>(values == kWhole ? std::round(normal * 8) : normal));
          }
          const int64_t blocks = kColumns / FixedBlock::kValues;
          std::vector<FixedBlock> fixed(rows * blocks);
          for (int r = 0; r < rows; ++r) {
            kind.table->pack_fixed(x.data() + r * kColumns, kColumns, fixed.data() + r * blocks);
          }
          std::vector<float> c(rows * kPanelLanes, kPoison);
          kind.table->panel_fixed[static_cast<int>(format)](packed.data(), kSuperblocks,
                                                            {fixed.data(), blocks}, rows, c.data());
          std::vector<double> got, want;
          for (int r = 0; r < rows; ++r) {
            for (int lane = 0; lane < kPanelLanes; ++lane) {
              double sum = 0;
              for (int64_t k = 0; k < kColumns; ++k) {
                sum += w.value(0, lane, k) * x[r * kColumns + k];
              }
              want.push_back(sum);
              got.push_back(static_cast<double>(c[r * kPanelLanes + lane]) *
                            kProductExponent[static_cast<int>(format)] * w.global[0]);
            }
          }
          const std::string name = kind.label + " fixed " + format_name(format) + " rows " +
                                   std::to_string(rows) + " values " + std::to_string(values);
          if (values == kWhole) {
            expect(got == want, name + ": exact");
          } else {
            expect_below(reference::relative_error(got, want), values == kNormal ? 6e-5 : 1e-4,
                         name);
          }
        }
      }
    }
  }
}

// Each power of two and its neighbours: no byte overflows, and what is beyond f32 poisons its
// block.
void test_fixed_range() {
  for (const Kind& kind : tables) {
    if (!kind.table->pack_fixed) continue;
    const auto error = [&](const std::vector<float>& x) {
      FixedBlock block;
      kind.table->pack_fixed(x.data(), 16, &block);
      static constexpr int kOrder[16] = {0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15};
      double largest = 0, worst = 0;
      int32_t sum = 0;
      for (int i = 0; i < 16; ++i) {
        const int32_t integer = block.high[i] * 256 + block.low[i];
        sum += integer;
        const double value = x[kOrder[i]];
        worst = std::max(worst, std::abs(2.0 * integer * block.scale - value));
        largest = std::max(largest, std::abs(value));
      }
      if (std::isnan(block.scale)) return static_cast<double>(kPoison);
      expect(block.correction == -12 * sum, kind.label + ": correction");
      return worst / largest;
    };
    for (int exponent = -100; exponent < 128; ++exponent) {
      for (const float factor : {1.0f, 1.5f, 1.99212f, 1.99215f, 1.9922f, 1.9999999f}) {
        for (const float sign : {1.0f, -1.0f}) {
          const float large = std::ldexp(sign * factor, exponent);
          std::vector<float> x;
          for (int i = 0; i < 16; ++i) x.push_back(large * (static_cast<float>(16 - i) / 16));
          expect_below(error(x), std::ldexp(1.0, -14), kind.label + ": 15 bits");
        }
      }
    }
    for (const float bad : {kPoison, std::numeric_limits<float>::infinity()}) {
      std::vector<float> x(16, 1.0f);
      x[7] = -bad;
      expect(std::isnan(error(x)), kind.label + ": a block with an infinity or a NaN is NaN");
    }
    expect(error(std::vector<float>(16, 0.0f)) != 0.0, kind.label + ": zeros");  // 0 / 0
  }
}

// Blocks of 8-bit integers are what the rule says, to the bit, in both forms; and products of them
// are exact but for the order of f32 sums.
void test_int8() {
  static constexpr int kOrder[16] = {0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15};
  Random random(11);
  std::vector<std::vector<float>> blocks;
  const auto block = [&](float largest, auto value) {
    blocks.emplace_back();
    for (int i = 0; i < 16; ++i) blocks.back().push_back(i == 3 ? largest : value(i));
  };
  for (int exponent = -149; exponent < 128; ++exponent) {
    // Around 127.5 units, where the next power of two takes over, and ties between integers.
    for (const float factor :
         {1.0f, 1.5f, 1.9765625f, 1.984375f, 1.992187f, 1.9921875f, 1.9999999f}) {
      const float largest = std::ldexp(random() % 2 ? factor : -factor, exponent);
      block(largest, [&](int i) { return largest * (static_cast<float>(i) / 16); });
      block(largest,
            [&](int i) { return std::ldexp(static_cast<float>(2 * i + 1), exponent - 7); });
      block(largest,
            [&](int) { return largest * static_cast<float>(reference::uniform(random, -1, 1)); });
    }
  }
  block(0.0f, [](int i) { return i % 2 ? 0.0f : -0.0f; });
  for (const float bad : {kPoison, std::numeric_limits<float>::infinity(), std::ldexp(127.5f, 104),
                          std::numeric_limits<float>::max()}) {
    block(-bad, [](int) { return 1.0f; });
  }
  block(std::nextafter(std::ldexp(127.5f, 104), 0.0f), [](int) { return 1.0f; });
#if defined(__x86_64__)
  const unsigned mode = _mm_getcsr();
  _mm_setcsr(mode | 0x8040);  // as in a job
#endif
  for (const Kind& kind : tables) {
    for (const std::vector<float>& x : blocks) {
      std::vector<double> want(x.begin(), x.end());
      reference::round_int8(want);
      std::vector<float> rounded = x;
      kind.table->round_int8(rounded.data(), 16);
      Int8Block packed;
      if (kind.table->pack_int8) kind.table->pack_int8(x.data(), 16, &packed);
      int32_t sum = 0, offset;
      for (int i = 0; i < 16; ++i) {
        const std::string name = kind.label + ": " + std::to_string(x[i]) + " of a block of " +
                                 std::to_string(x[3]) + " as an 8-bit integer";
        const bool nan = std::isnan(want[i]);
        expect(nan ? std::isnan(rounded[i]) : rounded[i] == want[i], name + ", rounded");
        if (!kind.table->pack_int8) continue;
        const int integer = packed.values[std::find(kOrder, kOrder + 16, i) - kOrder];
        sum += integer;
        // 1.5 * 2^(22 + e)
        const double unit = packed.offset / (1.5 * std::ldexp(1.0, 22));
        expect(nan ? std::isnan(unit) : integer * unit == want[i] && std::abs(integer) <= 127,
               name + ", packed");
      }
      std::memcpy(&offset, &packed.offset, sizeof(offset));
      if (kind.table->pack_int8 && !std::isnan(want[0])) {
        expect(packed.start == offset - 12 * sum, kind.label + ": start of the sums");
      }
    }
  }
#if defined(__x86_64__)
  _mm_setcsr(mode);
#endif
  constexpr int64_t kColumns = 1088, kBlocks = kColumns / 16;
  for (const Kind& kind : tables) {
    if (!kind.table->panel_int8[0]) continue;
    for (const Format format : {Format::kNvfp4, Format::kMxfp4}) {
      for (const int rows : {1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 31, 70}) {
        const reference::Weights w =
            reference::random_weights(format, 1, kPanelLanes, kColumns, Grid::kOrdinary, random);
        const std::vector<uint8_t> packed = w.pack(false);
        std::vector<float> x;
        for (int64_t i = 0; i < rows * kColumns; ++i) {
          x.push_back(static_cast<float>(
              std::normal_distribution<double>(0, i % 64 == 5 ? 30 : 1)(random)));
        }
        std::vector<double> values(x.begin(), x.end()), got, want;
        reference::round_int8(values);
        std::vector<Int8Block> integers(rows * kBlocks);
        for (int r = 0; r < rows; ++r) {
          kind.table->pack_int8(x.data() + r * kColumns, kColumns, integers.data() + r * kBlocks);
        }
        std::vector<float> c(rows * kPanelLanes, kPoison);
        kind.table->panel_int8[static_cast<int>(format)](
            packed.data(), kColumns / kSuperblockK, {integers.data(), kBlocks}, rows, c.data());
        for (int r = 0; r < rows; ++r) {
          for (int lane = 0; lane < kPanelLanes; ++lane) {
            double sum = 0;
            for (int64_t k = 0; k < kColumns; ++k) {
              sum += w.value(0, lane, k) * values[r * kColumns + k];
            }
            want.push_back(sum);
            got.push_back(static_cast<double>(c[r * kPanelLanes + lane]) *
                          kProductExponent[static_cast<int>(format)] * w.global[0]);
          }
        }
        expect_below(reference::relative_error(got, want), 1e-6,
                     kind.label + " int8 " + format_name(format) + " rows " + std::to_string(rows));
      }
    }
  }
}

// The thread's floating-point mode must not reach the result, and must be as before.
void test_float_mode([[maybe_unused]] Compute compute) {
#if defined(__x86_64__)
  constexpr unsigned kDefault = 0x1f80, kFlushing = 0x9fc0;
  Case c;
  c.compute = compute;
  c.shape = {3, 64, 64, 2, 1};
  c.bias = false;
  c.activation = Activation::kIdentity;
  Layer layer(c);
  for (int64_t i = 0; i < 3 * 64; ++i) layer.x().set(i, i % 2 ? 3e-39f : -1e-38f);
  for (const Kind& kind : runnable) {
    if (!kind.exists(compute)) continue;
    _mm_setcsr(kDefault);
    const Buffer ordinary = layer.run(kind, nullptr);
    expect(_mm_getcsr() == kDefault, kind.label + ": the float mode is restored");
    _mm_setcsr(kFlushing);
    const Buffer flushing = layer.run(kind, nullptr);
    const unsigned after = _mm_getcsr();
    _mm_setcsr(kDefault);
    expect(after == kFlushing, kind.label + ": the float mode is restored");
    expect(same_bits(ordinary, flushing), kind.label + ": the caller's float mode does not matter");
  }
#endif
}

void test_float_mode() {
  for (const Compute compute : kComputes) test_float_mode(compute);
}

// A pool that runs helpers at once and in line, one that never runs them before the job is over,
// and many callers.
class InlineExecutor : public Executor {
 public:
  int num_threads() const override { return 4; }
  void schedule(std::function<void()> task) override { task(); }
};
class LateExecutor : public Executor {
 public:
  int num_threads() const override { return 4; }
  void schedule(std::function<void()> task) override { late_.push_back(std::move(task)); }
  void run_late() {
    for (const auto& task : late_) task();
  }

 private:
  std::vector<std::function<void()>> late_;
};

void test_executors() {
  Case c;
  c.shape = {33, 256, 96, 4, 2};
  Layer layer(c);
  const Kind& kind = runnable.front();
  const Buffer want = layer.run(kind, nullptr);
  InlineExecutor in_line;
  expect(same_bits(want, layer.run(kind, &in_line)), "helpers run in line");
  LateExecutor late;
  expect(same_bits(want, layer.run(kind, &late)), "helpers that come too late");
  late.run_late();
  ThreadPool pool(4);
  std::vector<std::thread> callers;
  std::atomic<int> different{0};
  for (int i = 0; i < 4; ++i) {
    callers.emplace_back([&] {
      for (int rep = 0; rep < 20; ++rep) {
        // A caller has operands of its own: `run` writes to its buffers only.
        Layer own(c);
        if (!same_bits(want, own.run(kind, &pool))) ++different;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  expect(different == 0, "concurrent callers of one pool");
}

}  // namespace
}  // namespace jaxmoe::cpu

int main(int argc, char** argv) {
  using namespace jaxmoe::cpu;
  const std::pair<const char*, void (*)()> tests[] = {
      {"activations", &test_activations},
      {"shapes", &test_shapes},
      {"routings", &test_routings},
      {"exact", &test_exact},
      {"extremes", static_cast<void (*)()>(&test_extremes)},
      {"segments", static_cast<void (*)()>(&test_segments)},
      {"chunks", &test_many_tokens_in_chunks},
      {"grouped_matmul", &test_grouped_matmul},
      {"every_scale", &test_every_scale},
      {"fixed", &test_fixed},
      {"fixed_range", &test_fixed_range},
      {"int8", &test_int8},
      {"float_mode", static_cast<void (*)()>(&test_float_mode)},
      {"executors", &test_executors},
  };
  std::vector<std::string> variants, names;
  for (const Variant variant : built_variants()) variants.push_back(variant_name(variant));
  for (const auto& [name, test] : tests) names.push_back(name);

  // Arguments choose; of what is not chosen at all, everything runs.
  std::vector<std::string> chosen_variants, chosen_tests;
  const auto has = [](const std::vector<std::string>& all, const std::string& one) {
    return std::find(all.begin(), all.end(), one) != all.end();
  };
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (has(variants, argument)) {
      chosen_variants.push_back(argument);
    } else if (has(names, argument)) {
      chosen_tests.push_back(argument);
    } else {
      std::printf("'%s' is neither a variant nor a test; there are:", argument.c_str());
      for (const std::string& name : variants) std::printf(" %s", name.c_str());
      for (const std::string& name : names) std::printf(" %s", name.c_str());
      std::printf("\n");
      return 2;
    }
  }

  for (const Variant variant : built_variants()) {
    const std::string name = variant_name(variant), reason = why_not(variant);
    if (!chosen_variants.empty() && !has(chosen_variants, name)) continue;
    std::printf("%s\n", reason.empty() ? name.c_str() : ("left out: " + reason).c_str());
    if (reason.empty()) tables.push_back({name, kernels(variant)});
  }
#if defined(__x86_64__)
  if (chosen_variants.empty() && why_not(Variant::kAvx512Bf16).empty())
    tables.push_back({"cpu_amx (model)", &amx_model_kernels()});
#endif
  for (const Kind& own : tables) {
    runnable.push_back(own);
    for (const Tactic tactic : kNamedTactics) {
      const Kind named = {own.label + " " + tactic_name(tactic), own.table, tactic};
      if (named.exists(Compute::kW4a16) || named.exists(Compute::kW4a8)) runnable.push_back(named);
    }
  }
  for (const auto& [name, test] : tests) {
    if (!chosen_tests.empty() && !has(chosen_tests, name)) continue;
    const int before = checks;
    test();
    std::printf("%-16s %d checks\n", name, checks - before);
    std::fflush(stdout);
  }
  std::printf("%d checks, %d failed\n", checks.load(), failures.load());
  return failures == 0 && !runnable.empty() ? 0 : 1;
}
