// Checks and times the GPU kernels of one family through their C++ API, without JAX. From the
// repository root, in one line:
//
//   nvcc -std=c++17 -O3 --expt-relaxed-constexpr -gencode=arch=compute_90a,code=sm_90a -Icsrc
//       -DFAMILY=sm90 benchmarks/native/moe_mlp.cu csrc/sm90/*.cu csrc/sm80/tactic_mma8.cu csrc/cuda/*.cu -o bench_sm90
//   ./bench_sm90 check odd,qwen3-30b-a3b nvfp4,mxfp4 1,17,300 auto,decode,wgmma64
//   ./bench_sm90 time qwen3-30b-a3b nvfp4 1 fused,decode
//   ./bench_sm90 time gpt-oss-120b mxfp4 1,64,4096 auto
//
// and the same with sm80 alone in place of sm90, and the SM at hand. `all` are all tactics of a format.
// The formats are nvfp4, mxfp4, and mxfp4-fp8: mxfp4 with x and h quantised to e4m3 (W4A8). x is
// bf16, the activation SwiGLU, without biases. A line has the layer, format, tokens, tactic
// and error relative to float64 on a few tokens; with `time`, also the median time, packed bytes of
// the experts touched per second, and arithmetic rate. The exit status is 0 if all is right.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "cuda/moe_mlp.h"
#include "cuda/tactics.h"
#include "harness.h"

namespace jaxmoe::FAMILY {
extern const cuda::Family kFamily;
}

namespace jaxmoe::cuda {
namespace {

const Family& kFamily = FAMILY::kFamily;

using namespace jaxmoe::native;
using Bf16 = __nv_bfloat16;

// A correct kernel is several times closer; with e4m3 activations, about 0.04 away.
constexpr double max_error(Format format) { return is_fp8(format) ? 6e-2 : 1e-2; }
const char* const kFormats[] = {"nvfp4", "mxfp4", "mxfp4-fp8"};  // as in Format

// All experts' weights, as functions of their indices: the reference reads nothing packed.
struct Matrices {
  uint32_t seed;
  int experts, outputs, k;
  Format format;
  bool gated;

  int64_t bytes() const { return experts * matrix_bytes(format, outputs, k, gated); }
  __device__ int rows() const { return gated ? 2 * outputs : outputs; }
  __device__ int scale_block() const { return block_k(format) / scales_per_row(format); }
  __device__ uint64_t row_index(int expert, int row) const {
    return static_cast<uint64_t>(expert) * rows() + row;
  }
  // e2m1
  __device__ uint32_t element(int expert, int row, int column) const {
    return hash((static_cast<uint64_t>(seed) << 48) ^ (row_index(expert, row) * k + column)) & 15;
  }
  // As the layout encodes it: exponents -3 ... 1 for NVFP4, -6 ... 0 for MXFP4.
  __device__ uint32_t scale(int expert, int row, int block) const {
    const uint32_t h =
        hash((static_cast<uint64_t>(seed + 77) << 48) ^ (row_index(expert, row) * 4096 + block));
    if (is_fp8(format)) return 8 * (12 - h % 7);  // relative to kRowExponent
    return format == Format::kNvfp4 ? (17 << 3) + h % 40 : 244 - h % 7;
  }
  static constexpr uint32_t kRowExponent = 127 - 6;
  __device__ float value(int expert, int row, int column) const {
    constexpr float kMagnitudes[] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
    const uint32_t code = element(expert, row, column);
    const uint32_t s = scale(expert, row, column / scale_block());
    const uint32_t bits = is_fp8(format)             ? (s / 8 - 6 + kRowExponent) << 23
                          : format == Format::kNvfp4 ? (s + ((127 - 20) << 3)) << 20
                                                     : (s + 127 - 244) << 23;
    return (code & 8 ? -1.0f : 1.0f) * kMagnitudes[code & 7] * __uint_as_float(bits);
  }
  // The row that lies in row 0 ... 15 of a warp, or -1 for padding.
  __device__ int row_at(int strip, int warp, int place) const {
    const int output = gated ? 32 * strip + 8 * warp + place % 8 : 64 * strip + 16 * warp + place;
    if (output >= outputs) return -1;
    return gated && place >= 8 ? outputs + output : output;
  }
};

__device__ uint32_t packed_dword(const Matrices& m, int expert, int strip, int block, int index) {
  // Where the bits of an element go, the sign first, by register (dequantize.cuh).
  constexpr int kPlaces[4][4] = {{15, 8, 7, 6}, {12, 5, 4, 3}, {9, 2, 1, 0}, {14, 11, 10, 13}};
  const int warp = index / 128, lane = index / 4 % 32, step = index % 4;
  uint32_t dword = 0;
  for (int i = 0; i < 8; ++i) {
    const int reg = i / 2, half = i % 2;
    const int row = m.row_at(strip, warp, lane / 4 + 8 * (reg % 2));
    const int column = kBlockK * block + 16 * step + 2 * (lane % 4) + 8 * (reg / 2) + half;
    if (row < 0 || column >= m.k) continue;
    const uint32_t code = m.element(expert, row, column);
    for (int bit = 0; bit < 4; ++bit) {
      dword |= (code >> (3 - bit) & 1) << (kPlaces[reg][bit] + 16 * half);
    }
  }
  return dword;
}

__device__ uint8_t packed_scale(const Matrices& m, int expert, int strip, int block, int index) {
  const int per_row = scales_per_row(m.format);
  const int warp = index / (16 * per_row), place = index / (2 * per_row) % 8 + 8 * (index % 2);
  const int row = m.row_at(strip, warp, place);
  const int column_block = block * per_row + index / 2 % per_row;
  if (row < 0 || column_block * m.scale_block() >= m.k) return 0;
  return static_cast<uint8_t>(m.scale(expert, row, column_block));
}

// The same for e4m3 activations: a dword has eight elements of one row, then signs and magnitudes
// go apart (dequantize.cuh).
__device__ uint32_t packed_dword_fp8(const Matrices& m, int expert, int strip, int block,
                                     int index) {
  const int half = index / 512, warp = index / 128 % 4, lane = index / 4 % 32, step = index % 4;
  const int row = m.row_at(strip, warp, lane / 4 + 8 * half);
  uint32_t dword = 0;
  for (int i = 0; i < 8; ++i) {
    const int column = 128 * block + 32 * step + 16 * (i / 4) + 4 * (lane % 4) + i % 4;
    if (row < 0 || column >= m.k) continue;
    const uint32_t code = m.element(expert, row, column);
    dword |= (code & 7) << 4 * i;
    dword |= (code >> 3) << (8 * (i % 4) + (i < 4 ? 7 : 3));
  }
  return dword;
}

__device__ uint8_t packed_scale_fp8(const Matrices& m, int expert, int strip, int block,
                                    int index) {
  const int warp = index / 64, place = index / 8 % 8 + 8 * (index / 4 % 2);
  const int row = m.row_at(strip, warp, place), column_block = block * 4 + index % 4;
  if (row < 0 || column_block * 32 >= m.k) return 8;
  return static_cast<uint8_t>(m.scale(expert, row, column_block));
}

__global__ void pack(Matrices m, uint8_t* out) {
  const int64_t strips = num_strips(m.outputs, m.gated), blocks = num_blocks(m.k, m.format);
  const int64_t matrix = matrix_bytes(m.format, m.outputs, m.k, m.gated);
  const bool fp8 = is_fp8(m.format);
  for (int64_t i = blockIdx.x; i < m.experts * strips * blocks; i += gridDim.x) {
    const int expert = i / (strips * blocks), strip = i / blocks % strips, block = i % blocks;
    uint8_t* const whole_strip = out + expert * matrix + strip * strip_bytes(m.format, m.k);
    uint8_t* elements = whole_strip + block * block_bytes(m.format);
    uint8_t* scales = elements + element_bytes(m.format);
    for (int d = threadIdx.x; d < element_bytes(m.format) / 4; d += blockDim.x) {
      reinterpret_cast<uint32_t*>(elements)[d] = fp8 ? packed_dword_fp8(m, expert, strip, block, d)
                                                     : packed_dword(m, expert, strip, block, d);
    }
    for (int d = threadIdx.x; d < scale_bytes(m.format); d += blockDim.x) {
      scales[d] = fp8 ? packed_scale_fp8(m, expert, strip, block, d)
                      : packed_scale(m, expert, strip, block, d);
    }
    if (fp8 && block == 0 && threadIdx.x < kStripRows) {
      whole_strip[blocks * block_bytes(m.format) + threadIdx.x] = Matrices::kRowExponent;
    }
  }
}

std::shared_ptr<uint8_t> packed(const Matrices& m) {
  const auto out = allocate<uint8_t>(m.bytes());
  pack<<<1024, 256>>>(m, out.get());
  check(cudaGetLastError(), "pack");
  return out;
}

// Global scales with which a product of about unit variance has one again. Powers of two for MXFP4,
// as they are in practice.
std::vector<float> global_scales(const Matrices& m) {
  std::vector<float> scales(m.experts);
  for (int e = 0; e < m.experts; ++e) {
    const float scale = (1.0f + 0.25f * (e % 3)) / std::sqrt(static_cast<float>(m.k));
    scales[e] = m.format == Format::kNvfp4 ? scale / 4 : std::exp2(std::rint(std::log2(scale / 2)));
  }
  return scales;
}

__global__ void fill_input(Bf16* x, int64_t size) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < size; i += stride) {
    x[i] = __float2bfloat16(normal(i));
  }
}

__device__ double widen(Bf16 v) { return __bfloat162float(v); }
__device__ double widen(double v) { return v; }

template <class T>
__device__ double dot(const Matrices& m, int expert, int row, const T* x) {
  double sum = 0.0;
  for (int k = 0; k < m.k; ++k) sum += m.value(expert, row, k) * widen(x[k]);
  return sum;
}

struct Chosen {
  const int* tokens;
  int top_k;
  const int32_t* expert_ids;  // of all tokens
  const float* weights;
};

// h [chosen, k, I] = silu(gate) * up. The grid is (values of I, chosen * k).
__global__ void reference_up(Matrices m, const float* global, const Bf16* x, Chosen chosen,
                             double* h) {
  const int output = blockIdx.x * blockDim.x + threadIdx.x, pair = blockIdx.y;
  if (output >= m.outputs) return;
  const int64_t token = chosen.tokens[pair / chosen.top_k];
  const int expert = chosen.expert_ids[token * chosen.top_k + pair % chosen.top_k];
  const double gate = global[expert] * dot(m, expert, output, x + token * m.k);
  const double up = global[expert] * dot(m, expert, m.outputs + output, x + token * m.k);
  h[int64_t{pair} * m.outputs + output] = gate / (1.0 + exp(-gate)) * up;
}

// y [chosen, H], weighted and summed. The grid is (values of H, chosen).
__global__ void reference_down(Matrices m, const float* global, const double* h, Chosen chosen,
                               double* y) {
  const int output = blockIdx.x * blockDim.x + threadIdx.x;
  const int64_t row = blockIdx.y, token = chosen.tokens[row];
  if (output >= m.outputs) return;
  double sum = 0.0;
  for (int j = 0; j < chosen.top_k; ++j) {
    const int64_t pair = token * chosen.top_k + j;
    const int expert = chosen.expert_ids[pair];
    const double value = dot(m, expert, output, h + (row * chosen.top_k + j) * m.k);
    sum += value * global[expert] * chosen.weights[pair];
  }
  y[row * m.outputs + output] = sum;
}

// One layer in one format, for up to `max_tokens` tokens.
class Bench {
 public:
  Bench(const Layer& layer, Format format, int max_tokens, bool timed)
      : layer_(layer), format_(format), timed_(timed) {
    std::vector<float> weights(int64_t{max_tokens} * layer.top_k), params(3 * layer.experts, 1.0f);
    for (float& w : weights) w = 0.05f + static_cast<float>(random_() % 1000) / 2000.0f;
    weights_ = upload(weights);
    // alpha = 1, beta = 0 and no limit: plain SwiGLU.
    std::fill(params.begin() + layer.experts, params.end() - layer.experts, 0.0f);
    std::fill(params.end() - layer.experts, params.end(), INFINITY);
    params_ = upload(params);
    // Enough sets for none to be in the L2 cache when it is used again (but all of `odd` fits).
    const int64_t wanted = 1'200'000'000 / (layer.experts * expert_bytes()) + 1;
    const int sets = timed ? static_cast<int>(std::clamp<int64_t>(wanted, 2, 6)) : 1;
    for (int i = 0; i < sets; ++i) {
      const std::vector<int32_t> ids = random_routing(layer, max_tokens, &random_);
      sets_.push_back({packed(gate_up(i)), packed(down(i)), upload(ids), ids});
    }
    const int64_t values = int64_t{max_tokens} * layer.hidden;
    x_ = allocate<Bf16>(values);
    out_ = allocate<Bf16>(values);
    workspace_ = allocate<uint8_t>(mlp_workspace_bytes(format, shape(max_tokens)));
    fill_input<<<1024, 256>>>(x_.get(), values);
    check(cudaDeviceSynchronize(), "making the inputs");
  }

  // Prints one line; false where something is wrong.
  bool run(int tokens, const std::string& tactic) {
    const char* usual = default_tactic(kFamily, format_, shape(tokens), true);
    std::printf("%-15s %-9s T=%-5d %-9s", layer_.name.c_str(), kFormats[static_cast<int>(format_)],
                tokens, tactic.empty() ? usual : tactic.c_str());
    std::fflush(stdout);  // says which case it was if the kernel hangs
    const bool right = verify(tokens, tactic);
    if (right && timed_) measure(tokens, tactic);
    std::printf("\n");
    std::fflush(stdout);
    return right;
  }

 private:
  struct Set {
    std::shared_ptr<uint8_t> gate_up, down;
    std::shared_ptr<int32_t> ids;
    std::vector<int32_t> host_ids;
  };

  MlpShape shape(int tokens) const {
    return {tokens, layer_.hidden, layer_.intermediate, layer_.experts, layer_.top_k};
  }
  int64_t expert_bytes() const { return (gate_up(0).bytes() + down(0).bytes()) / layer_.experts; }
  Matrices gate_up(uint32_t set) const {
    return {11 + set, layer_.experts, layer_.intermediate, layer_.hidden, format_, true};
  }
  Matrices down(uint32_t set) const {
    return {911 + set, layer_.experts, layer_.hidden, layer_.intermediate, format_, false};
  }

  // "" or what went wrong.
  std::string enqueue(int tokens, const std::string& tactic, const Set& set) const {
    MlpArgs args{};
    args.shape = shape(tokens);
    args.format = format_;
    args.dtype = Dtype::kBf16;
    args.activation = Activation::kSwiglu;
    args.num_params = 3;
    args.x = x_.get();
    args.gate_up = set.gate_up.get();
    args.gate_up_global = gate_up_global_.get();
    args.down = set.down.get();
    args.down_global = down_global_.get();
    args.params = params_.get();
    args.expert_ids = set.ids.get();
    args.weights = weights_.get();
    args.expert_offset = expert_offset_.get();
    args.out = out_.get();
    return moe_mlp(kFamily, args, tactic, workspace_.get(), stream_.get());
  }

  // All bits set are NaN in every float: shows what is read too early, or never written.
  std::string run_poisoned(int tokens, const std::string& tactic, std::vector<Bf16>* result) {
    const int64_t values = int64_t{tokens} * layer_.hidden;
    check(cudaMemset(workspace_.get(), 0xff, mlp_workspace_bytes(format_, shape(tokens))),
          "cudaMemset");
    check(cudaMemset(out_.get(), 0xff, values * sizeof(Bf16)), "cudaMemset");
    const std::string complaint = enqueue(tokens, tactic, sets_[0]);
    check(cudaStreamSynchronize(stream_.get()), "moe_mlp");
    *result = download(out_, values);
    return complaint;
  }

  bool verify(int tokens, const std::string& tactic) {
    std::vector<Bf16> result, again;
    std::string complaint = run_poisoned(tokens, tactic, &result);
    if (complaint.empty()) complaint = run_poisoned(tokens, tactic, &again);
    if (!complaint.empty()) {
      std::printf(" ERROR %s", complaint.c_str());
      return false;
    }
    const double error = relative_error(tokens, result);
    const bool close = error < max_error(format_);  // not if NaN
    const bool finite = std::all_of(result.begin(), result.end(),
                                    [](Bf16 v) { return std::isfinite(__bfloat162float(v)); });
    const bool repeats = !std::memcmp(result.data(), again.data(), result.size() * sizeof(Bf16));
    std::printf(" error %.2e%s%s%s", error, close ? "" : " WRONG", finite ? "" : " NONFINITE",
                repeats ? "" : " NOT-REPEATABLE");
    return close && finite && repeats;
  }

  // Relative L2 distance from float64, on all tokens or, where they are many, some with the last.
  double relative_error(int tokens, const std::vector<Bf16>& result) {
    std::vector<int> chosen(std::min(tokens, timed_ ? 4 : 24), tokens - 1);
    const int count = static_cast<int>(chosen.size()), hidden = layer_.hidden;
    for (int i = 0; i + 1 < count; ++i) chosen[i] = count == tokens ? i : random_() % tokens;
    const auto device_chosen = upload(chosen);
    const auto h = allocate<double>(int64_t{count} * layer_.top_k * layer_.intermediate);
    const auto y = allocate<double>(int64_t{count} * hidden);
    const Chosen view{device_chosen.get(), layer_.top_k, sets_[0].ids.get(), weights_.get()};
    const dim3 up_grid(divide_up(layer_.intermediate, 128), count * layer_.top_k);
    const dim3 down_grid(divide_up(hidden, 128), count);
    reference_up<<<up_grid, 128>>>(gate_up(0), gate_up_global_.get(), x_.get(), view, h.get());
    reference_down<<<down_grid, 128>>>(down(0), down_global_.get(), h.get(), view, y.get());
    check(cudaDeviceSynchronize(), "reference");
    const std::vector<double> expected = download(y, int64_t{count} * hidden);
    double distance = 0.0, norm = 0.0;
    for (size_t i = 0; i < expected.size(); ++i) {
      const int64_t token = chosen[i / hidden];
      const double off = __bfloat162float(result[token * hidden + i % hidden]) - expected[i];
      distance += off * off;
      norm += expected[i] * expected[i];
    }
    return std::sqrt(distance / norm);
  }

  // Two calls with each set, in turn, as a graph: their launches cost no time of the host.
  std::shared_ptr<CUgraphExec_st> capture(int tokens, const std::string& tactic) const {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    check(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeGlobal), "begin capture");
    for (size_t i = 0; i < 2 * sets_.size(); ++i) {
      const std::string complaint = enqueue(tokens, tactic, sets_[i % sets_.size()]);
      if (!complaint.empty()) die(complaint);
    }
    check(cudaStreamEndCapture(stream_.get(), &graph), "end capture");
    const auto owner = own(graph, cudaGraphDestroy);
    check(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
    return own(exec, cudaGraphExecDestroy);
  }

  // Median milliseconds of 40 replays, or of at least 7 where those take more than 250 ms.
  float replay(cudaGraphExec_t graph) const {
    const auto begin = create<CUevent_st>(cudaEventCreate, cudaEventDestroy);
    const auto end = create<CUevent_st>(cudaEventCreate, cudaEventDestroy);
    for (int i = 0; i < 3; ++i) check(cudaGraphLaunch(graph, stream_.get()), "warm-up");
    check(cudaStreamSynchronize(stream_.get()), "warm-up");
    std::vector<float> times;
    for (float total = 0.0f; times.size() < 7 || (times.size() < 40 && total < 250.0f);) {
      check(cudaEventRecord(begin.get(), stream_.get()), "cudaEventRecord");
      check(cudaGraphLaunch(graph, stream_.get()), "cudaGraphLaunch");
      check(cudaEventRecord(end.get(), stream_.get()), "cudaEventRecord");
      check(cudaEventSynchronize(end.get()), "replay");
      times.emplace_back();
      check(cudaEventElapsedTime(&times.back(), begin.get(), end.get()), "elapsed time");
      total += times.back();
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  }

  void measure(int tokens, const std::string& tactic) const {
    const auto sets = static_cast<double>(sets_.size());
    const double us = replay(capture(tokens, tactic).get()) * 1e3 / (2 * sets);
    const int64_t pairs = int64_t{tokens} * layer_.top_k;
    size_t touched = 0;  // experts, by all routings
    for (const Set& set : sets_) {
      touched += std::set<int>(set.host_ids.begin(), set.host_ids.begin() + pairs).size();
    }
    const double bytes = static_cast<double>(touched * expert_bytes()) / sets;
    const double flops = 6.0 * static_cast<double>(pairs) * layer_.hidden * layer_.intermediate;
    std::printf("  %8.1f us  %6.0f GB/s  %6.1f TFLOP/s", us, bytes / us * 1e-3, flops / us * 1e-6);
  }

  const Layer layer_;
  const Format format_;
  const bool timed_;
  std::mt19937 random_{3};
  std::shared_ptr<float> weights_, params_;
  std::shared_ptr<float> gate_up_global_ = upload(global_scales(gate_up(0)));
  std::shared_ptr<float> down_global_ = upload(global_scales(down(0)));
  std::shared_ptr<int32_t> expert_offset_ = upload(std::vector<int32_t>{0});
  std::shared_ptr<Bf16> x_, out_;
  std::shared_ptr<uint8_t> workspace_;
  std::shared_ptr<CUstream_st> stream_ = create<CUstream_st>(cudaStreamCreate, cudaStreamDestroy);
  std::vector<Set> sets_;
};

Format parse_format(const std::string& name) {
  std::string names;
  for (int i = 0; i < 3; ++i) {
    if (name == kFormats[i]) return static_cast<Format>(i);
    names += std::string(" ") + kFormats[i];
  }
  die("format '" + name + "' is none of" + names);
}

std::vector<std::string> tactic_names(Format format, const std::string& list) {
  std::vector<std::string> names;
  for (const std::string& item : split(list)) {
    if (item == "all") {
      for (const TacticInfo& info : tactics(kFamily, format)) names.emplace_back(info.name);
    } else {
      names.push_back(item == "auto" ? "" : item);
    }
  }
  return names;
}

int run(int argc, char** argv) {
  const std::string mode = argc == 6 ? argv[1] : "";
  if (mode != "check" && mode != "time") {
    die("usage: bench check|time LAYERS FORMATS TOKENS TACTICS, with commas in the lists");
  }
  std::vector<int> token_counts;
  for (const std::string& item : split(argv[4])) token_counts.push_back(std::atoi(item.c_str()));
  const auto [least, most] = std::minmax_element(token_counts.begin(), token_counts.end());
  if (token_counts.empty() || *least < 1) die("the token counts must be positive");
  bool right = true;
  for (const std::string& layer : split(argv[2])) {
    for (const std::string& format : split(argv[3])) {
      Bench bench(parse_layer(layer), parse_format(format), *most, mode == "time");
      for (const int tokens : token_counts) {
        for (const std::string& tactic : tactic_names(parse_format(format), argv[5])) {
          right &= bench.run(tokens, tactic);
        }
      }
    }
  }
  return right ? 0 : 1;
}

}  // namespace
}  // namespace jaxmoe::cuda

int main(int argc, char** argv) { return jaxmoe::cuda::run(argc, argv); }
