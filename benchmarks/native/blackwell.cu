// Checks the kernels of csrc/sm120 or csrc/sm100 through their C++ API, without JAX: on their own
// GPU, or emulated on an H100. `cmake --build BUILD --target check_sm120_emulated` (or check_sm120,
// ...) makes it, with JAXMOE_BUILD_CPP_TESTS=ON.
//
//   check_sm120_emulated layers odd,qwen3-30b-a3b nvfp4 0,1,17,300 auto,n32
//   check_sm120_emulated features nvfp4,mxfp4
//   check_sm120_emulated time qwen3-30b-a3b nvfp4 1,64 auto
//
// `layers` compares a few tokens of each problem with a float64 reference that quantises
// activations as csrc/blackwell/layout.h says, and prints the relative L2 error, the norm of what
// was expected, and how many bits were wrong in a second run; every buffer holds NaN before. An
// error of 0 is one of results that need no rounding: MXFP4's scales are powers of two here, so
// that without weights and biases after the products a result has the bits of its bf16 product.
//
// `features` does the same for biases, activations, static scales, expert shards, extreme inputs
// and routings, CUDA graphs, two streams, and the grouped product. The exit status is 0 if all is
// right.
#include <cuda_bf16.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>

#include "blackwell/moe_mlp.h"
#include "harness.h"

namespace jaxmoe::blackwell {
namespace {

using namespace jaxmoe::native;
using Bf16 = __nv_bfloat16;

constexpr double kMaxError = 5e-3;

// How far a result is from the reference.
struct Distance {
  double error = 0.0, norm = 0.0;  // sums of squares until `finished`

  void add(double result, double expected) {
    error += (result - expected) * (result - expected);
    norm += expected * expected;
  }
  // Relative, where there is something to be relative to.
  Distance finished() const {
    return {norm == 0.0 ? std::sqrt(error) : std::sqrt(error / norm), std::sqrt(norm)};
  }
  void print() const { std::printf(" error %.2e of %.1e", error, norm); }
  // Says what is wrong, or "": a comparison with zeros alone is one only where they are expected.
  std::string complaint(bool zero_expected) const {
    if ((norm == 0.0) != zero_expected) return " NOTHING-COMPARED";
    return error < kMaxError ? "" : " WRONG";
  }
};
const char* const kFormats[] = {"nvfp4", "mxfp4"};  // as in Format

// ---- the reference's numbers: by search, in float64
// ----------------------------------------------

__device__ double e2m1_value(uint32_t code) {
  constexpr double kMagnitudes[] = {0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0};
  return (code & 8 ? -1.0 : 1.0) * kMagnitudes[code & 7];
}
__device__ double e4m3_value(uint32_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const double magnitude =
      exponent == 0 ? ldexp(mantissa, -9) : ldexp(8.0 + mantissa, exponent - 10);
  return code & 0x80 ? -magnitude : magnitude;
}
// The nearest of the values of codes 0 ... `last`, ties to the even code.
template <class Value>
__device__ double nearest(double v, int last, Value value) {
  const double a = fabs(v);
  int best = 0;
  for (int code = 1; code <= last; ++code) {
    const double off = fabs(value(code) - a), least = fabs(value(best) - a);
    if (off < least || (off == least && code % 2 == 0)) best = code;
  }
  return v < 0 ? -value(best) : value(best);
}
__device__ double nearest_e2m1(double v) { return nearest(v, 7, e2m1_value); }
__device__ double nearest_e4m3(double v) { return nearest(v, 126, e4m3_value); }

// ---- weights, as functions of their indices: the reference reads nothing packed
// ------------------

struct Matrices {
  uint32_t seed;
  int experts, outputs, k;
  Format format;

  int64_t bytes() const { return experts * matrix_bytes(format, outputs, k); }
  __device__ uint64_t row_index(int expert, int row) const {
    return static_cast<uint64_t>(expert) * outputs + row;
  }
  __device__ uint32_t element(int expert, int row, int column) const {
    return hash((static_cast<uint64_t>(seed) << 48) ^ (row_index(expert, row) * k + column)) & 15;
  }
  // Exponents -3 ... 1 for NVFP4, -6 ... 0 for MXFP4.
  __device__ uint32_t scale(int expert, int row, int block) const {
    const uint32_t h =
        hash((static_cast<uint64_t>(seed + 77) << 48) ^ (row_index(expert, row) * 4096 + block));
    return format == Format::kNvfp4 ? 4 * 8 + h % 40 : 121 + h % 7;
  }
  __device__ double value(int expert, int row, int column) const {
    const uint32_t s = scale(expert, row, column / block_size(format));
    return e2m1_value(element(expert, row, column)) *
           (format == Format::kNvfp4 ? e4m3_value(s) : ldexp(1.0, static_cast<int>(s) - 127));
  }
};

// A block of threads packs a row, padded rows too.
__global__ void pack(Matrices m, uint8_t* out) {
  const int padded_rows = (m.outputs + 127) / 128 * 128, vector = block_size(m.format);
  const int k_tiles = (m.k / vector + 3) / 4;
  for (int64_t i = blockIdx.x; i < int64_t{m.experts} * padded_rows; i += gridDim.x) {
    const int e = i / padded_rows, row = i % padded_rows;
    uint8_t* matrix = out + e * matrix_bytes(m.format, m.outputs, m.k);
    uint8_t* scales = matrix + (int64_t{m.outputs} * m.k / 2 + 127) / 128 * 128;
    if (row < m.outputs) {
      for (int j = threadIdx.x; j < m.k / 2; j += blockDim.x) {
        matrix[int64_t{row} * (m.k / 2) + j] =
            m.element(e, row, 2 * j) | m.element(e, row, 2 * j + 1) << 4;
      }
    }
    for (int b = threadIdx.x; b < 4 * k_tiles; b += blockDim.x) {
      // [row tile][K tile][32 rows][4 groups of 32 rows][4 blocks]
      const int64_t at =
          (((int64_t{row / 128} * k_tiles + b / 4) * 32 + row % 32) * 4 + row % 128 / 32) * 4 +
          b % 4;
      const bool inside = row < m.outputs && b < m.k / vector;
      scales[at] = inside ? static_cast<uint8_t>(m.scale(e, row, b)) : 0;
    }
  }
}

std::shared_ptr<uint8_t> packed(const Matrices& m) {
  const auto out = allocate<uint8_t>(m.bytes());
  check(cudaMemset(out.get(), 0, m.bytes()), "cudaMemset");
  pack<<<1024, 128>>>(m, out.get());
  check(cudaGetLastError(), "pack");
  return out;
}

// Global scales with which a product of about unit variance has one again.
std::vector<float> global_scales(const Matrices& m) {
  std::vector<float> scales(m.experts);
  for (int e = 0; e < m.experts; ++e) {
    const float scale = (1.0f + 0.25f * (e % 3)) / std::sqrt(static_cast<float>(m.k));
    scales[e] = m.format == Format::kNvfp4 ? scale / 4 : std::exp2(std::rint(std::log2(scale / 2)));
  }
  return scales;
}

// ---- inputs
// --------------------------------------------------------------------------------------

enum class Extreme { kNone, kRange, kNonfinite };

// About normal. Every third token has blocks from 2^0 down to 2^-24, and one of five is zero with
// kRange; tokens 0 and 1 hold an infinity and a NaN with kNonfinite.
__global__ void fill_input(Bf16* x, int tokens, int hidden, Extreme extreme) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x, size = int64_t{tokens} * hidden;
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < size; i += stride) {
    const int token = i / hidden, column = i % hidden;
    float v = normal(i);
    if (extreme == Extreme::kRange) {
      if (token % 3 == 0) v *= exp2f(-static_cast<float>(hash(i / 16) % 25));
      if (token % 5 == 1) v = 0.0f;
    }
    if (extreme == Extreme::kNonfinite && column == hidden / 2 && token < 2) {
      v = token == 0 ? INFINITY : NAN;
    }
    x[i] = __float2bfloat16(v);
  }
}

// ---- the reference
// -------------------------------------------------------------------------------

struct Chosen {
  const int* tokens;
  int count, top_k;
  const int32_t* expert_ids;  // of all tokens
  const float* weights;
  int offset, experts;  // of the shard

  __device__ int64_t pair(int i) const { return int64_t{tokens[i / top_k]} * top_k + i % top_k; }
  __device__ int expert(int i) const {
    const int e = expert_ids[pair(i)] - offset;
    return e >= 0 && e < experts ? e : -1;
  }
};

__global__ void reference_input(const Bf16* x, int k, Chosen chosen, bool weight_on_input,
                                float* v) {
  const int64_t token = chosen.tokens[blockIdx.x];
  for (int i = threadIdx.x; i < k; i += blockDim.x) {
    const float value = __bfloat162float(x[token * k + i]);
    v[int64_t{blockIdx.x} * k + i] = weight_on_input ? value * chosen.weights[token] : value;
  }
}

// q = code * scale of each number of a row, and the row's g. A block of threads has a row.
__global__ void reference_quantize(Format format, int k, const float* input_scale, const float* v,
                                   double* q, float* g) {
  __shared__ unsigned row_bits;
  const int vector = block_size(format);
  const float* row = v + int64_t{blockIdx.x} * k;
  if (threadIdx.x == 0) row_bits = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < k; i += blockDim.x) {
    atomicMax(&row_bits, __float_as_uint(fabsf(row[i])));
  }
  __syncthreads();
  float scale = input_scale ? *input_scale : 1.0f;
  if (format == Format::kNvfp4 && !input_scale) {
    scale = __fdiv_rn(__uint_as_float(row_bits), 448.0f * 6.0f);
    if (scale == 0.0f) scale = 1.0f;
  }
  if (threadIdx.x == 0) g[blockIdx.x] = scale;
  for (int b = threadIdx.x; b < k / vector; b += blockDim.x) {
    float amax = 0.0f;
    const auto number = [&](int i) {
      const float value = row[b * vector + i];
      return format == Format::kMxfp4 && input_scale ? __fdiv_rn(value, scale) : value;
    };
    for (int i = 0; i < vector; ++i) amax = fmaxf(amax, fabsf(number(i)));
    for (int i = 0; i < vector; ++i) {
      double value = 0.0;
      if (format == Format::kNvfp4) {
        const double s = nearest_e4m3(__fdiv_rn(amax, __fmul_rn(6.0f, scale)));
        const float step = __fmul_rn(static_cast<float>(s), scale);
        if (s != 0.0) value = s * nearest_e2m1(__fdiv_rn(number(i), step));
      } else {
        const int exponent = amax == 0.0f ? -127 : max(ilogb(static_cast<double>(amax)) - 8, -127);
        value = ldexp(nearest_e4m3(ldexp(static_cast<double>(number(i)), -exponent)), exponent);
      }
      q[int64_t{blockIdx.x} * k + b * vector + i] = value;
    }
  }
}

// The product of the pair blockIdx.y, rounded to bf16; `copies` pairs share a row of q.
__global__ void reference_product(Matrices m, const double* q, int copies, Chosen chosen,
                                  double* d) {
  const int output = blockIdx.x * blockDim.x + threadIdx.x, pair = blockIdx.y;
  const int expert = chosen.expert(pair);
  if (output >= m.outputs || expert < 0) return;
  const double* row = q + int64_t{pair / copies} * m.k;
  double sum = 0.0;
  for (int k = 0; k < m.k; ++k) sum += m.value(expert, output, k) * row[k];
  d[int64_t{pair} * m.outputs + output] =
      __bfloat162float(__float2bfloat16_rn(static_cast<float>(sum)));
}

struct ActivationOf {
  cuda::Activation kind;
  const float* params;  // [num_params, experts]
};

__device__ double reference_activation(const ActivationOf& a, int e, int experts, double gate,
                                       double up) {
  const auto p = [&](int i) { return static_cast<double>(a.params[i * experts + e]); };
  const auto swish = [](double v, double alpha) { return v / (1.0 + exp(-alpha * v)); };
  const auto clip = [](double v, double limit) { return fmax(-limit, fmin(v, limit)); };
  switch (a.kind) {
    case cuda::Activation::kSwiglu:
      return swish(fmin(gate, p(2)), p(0)) * (clip(up, p(2)) + p(1));
    case cuda::Activation::kGeglu:
      return 0.5 * gate * (1.0 + erf(gate / sqrt(2.0))) * up;
    case cuda::Activation::kSitu:
      return p(0) * tanh(gate / p(0)) / (1.0 + exp(-gate)) * (p(1) * tanh(up / p(1)));
    case cuda::Activation::kRelu2:
      return gate > 0 ? gate * gate : 0.0;
    default:
      return gate;  // kIdentity
  }
}

__global__ void reference_hidden(const double* d, int intermediate, bool gated, int copies,
                                 const float* global, const float* g, const float* bias,
                                 ActivationOf activation, Chosen chosen, float* h) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x, pair = blockIdx.y;
  const int expert = chosen.expert(pair);
  if (i >= intermediate) return;
  const int width = (gated ? 2 : 1) * intermediate;
  const auto value = [&](int column) {
    const double b = bias ? bias[int64_t{expert} * width + column] : 0.0f;
    return d[int64_t{pair} * width + column] * global[expert] * g[pair / copies] + b;
  };
  float result = 0.0f;
  if (expert >= 0) {
    result = static_cast<float>(reference_activation(activation, expert, chosen.experts, value(i),
                                                     gated ? value(intermediate + i) : 0.0));
  }
  h[int64_t{pair} * intermediate + i] = result;
}

// y [chosen, H], weighted and summed.
__global__ void reference_combine(const double* d, int hidden, const float* global, const float* g,
                                  const float* bias, bool weighted, Chosen chosen, double* y) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x, row = blockIdx.y;
  if (i >= hidden) return;
  double sum = 0.0;
  for (int j = 0; j < chosen.top_k; ++j) {
    const int pair = row * chosen.top_k + j, expert = chosen.expert(pair);
    if (expert < 0) continue;
    const double b = bias ? bias[int64_t{expert} * hidden + i] : 0.0f;
    const double value = d[int64_t{pair} * hidden + i] * global[expert] * g[pair] + b;
    sum += value * (weighted ? chosen.weights[chosen.pair(pair)] : 1.0f);
  }
  y[int64_t{row} * hidden + i] = sum;
}

// ---- one problem
// ---------------------------------------------------------------------------------

struct Features {
  cuda::Activation activation = cuda::Activation::kSwiglu;
  bool bias = false, static_scales = false, weight_on_input = false;
  Extreme extreme = Extreme::kNone;
  int offset = 0;      // of the shard among the ids
  int hot = -1;        // an expert that every token chooses first
  bool graph = false;  // captured and replayed
};

class Problem {
 public:
  Problem(const Layer& layer, Format format, int tokens, const Features& features)
      : layer_(layer), format_(format), tokens_(tokens), features_(features) {
    const int64_t rows = std::max(tokens, 1);
    ids_ = random_routing(layer, static_cast<int>(rows), &random_);
    for (int64_t t = 0; t < rows && features.hot >= 0; ++t) {
      int32_t* const choices = &ids_[t * layer.top_k];
      std::replace(choices, choices + layer.top_k, features.hot, choices[0]);
      choices[0] = features.hot;
    }
    device_ids_ = upload(ids_);
    std::vector<float> weights(rows * layer.top_k);
    for (float& w : weights) w = 0.05f + static_cast<float>(random_() % 1000) / 2000.0f;
    weights_ = upload(weights);
    offset_ = upload(std::vector<int32_t>{features.offset});
    gate_up_ = packed(gate_up());
    down_ = packed(down());
    gate_up_global_ = upload(global_scales(gate_up()));
    down_global_ = upload(global_scales(down()));
    if (features.bias) {
      gate_up_bias_ = biases(gate_up().outputs);
      down_bias_ = biases(layer.hidden);
    }
    if (features.static_scales) {
      gate_up_scale_ = upload(std::vector<float>{format == Format::kNvfp4 ? 0.0021f : 0.7f});
      down_scale_ = upload(std::vector<float>{format == Format::kNvfp4 ? 0.0043f : 1.3f});
    }
    std::vector<float> params(3 * layer.experts);
    for (int e = 0; e < layer.experts; ++e) {  // plain SwiGLU unless there is more to check
      const bool plain = !features.bias;
      const bool situ = features.activation == cuda::Activation::kSitu;
      params[e] = plain ? 1.0f : situ ? 2.5f + 0.1f * e : 1.702f;
      params[layer.experts + e] = plain ? 0.0f : situ ? 3.0f : 1.0f;
      params[2 * layer.experts + e] = plain ? INFINITY : 1.5f + 0.2f * e;
    }
    params_ = upload(params);
    x_ = allocate<Bf16>(rows * layer.hidden);
    out_ = allocate<Bf16>(rows * layer.hidden);
    workspace_ = allocate<uint8_t>(std::max<int64_t>(workspace_bytes(), 1));
    fill_input<<<512, 256>>>(x_.get(), static_cast<int>(rows), layer.hidden, features.extreme);
    check(cudaDeviceSynchronize(), "making the inputs");
  }

  // Says what is wrong, or "".
  std::string verify(const std::string& tactic) {
    std::vector<Bf16> result, again;
    std::string complaint = run_poisoned(tactic, &result);
    if (complaint.empty()) complaint = run_poisoned(tactic, &again);
    if (!complaint.empty()) return "ERROR " + complaint;
    size_t different = 0, nonfinite = 0;
    for (size_t i = 0; i < result.size(); ++i) {
      different += std::memcmp(&result[i], &again[i], sizeof(Bf16)) != 0;
      const bool expect_nan =
          features_.extreme == Extreme::kNonfinite && i < 2 * static_cast<size_t>(layer_.hidden);
      nonfinite += std::isnan(__bfloat162float(result[i])) != expect_nan ||
                   std::isinf(__bfloat162float(result[i]));
    }
    const Distance distance = tokens_ ? distance_from_reference(result) : Distance{};
    distance.print();
    std::string wrong = distance.complaint(nobody_is_here());
    if (nonfinite) wrong += " NONFINITE:" + std::to_string(nonfinite);
    if (different) wrong += " NOT-REPEATABLE:" + std::to_string(different);
    return wrong;
  }

  std::string enqueue(const std::string& tactic, cudaStream_t stream, void* workspace = nullptr,
                      Bf16* out = nullptr) const {
    MlpArgs args{};
    args.shape = shape();
    args.format = format_;
    args.activation = features_.activation;
    args.num_params = 3;
    args.weight_on_input = features_.weight_on_input;
    args.x = x_.get();
    args.gate_up = gate_up_.get();
    args.gate_up_global = gate_up_global_.get();
    args.down = down_.get();
    args.down_global = down_global_.get();
    args.gate_up_bias = gate_up_bias_.get();
    args.down_bias = down_bias_.get();
    args.params = params_.get();
    args.gate_up_input_scale = gate_up_scale_.get();
    args.down_input_scale = down_scale_.get();
    args.expert_ids = device_ids_.get();
    args.weights = weights_.get();
    args.expert_offset = offset_.get();
    args.out = out ? out : out_.get();
    return moe_mlp(args, tactic, workspace ? workspace : workspace_.get(), stream);
  }

  // Two calls on two streams at once, each with its own workspace: both right, bit by bit.
  std::string verify_streams(const std::string& tactic) {
    std::vector<Bf16> expected;
    std::string complaint = run_poisoned(tactic, &expected);
    if (!complaint.empty()) return "ERROR " + complaint;
    std::vector<std::shared_ptr<CUstream_st>> streams;
    std::vector<std::shared_ptr<uint8_t>> workspaces;
    std::vector<std::shared_ptr<Bf16>> outs;
    for (int i = 0; i < 2; ++i) {
      streams.push_back(create<CUstream_st>(cudaStreamCreate, cudaStreamDestroy));
      workspaces.push_back(allocate<uint8_t>(workspace_bytes()));
      outs.push_back(allocate<Bf16>(expected.size()));
    }
    for (int repeat = 0; repeat < 8; ++repeat) {
      for (int i = 0; i < 2; ++i) {
        complaint = enqueue(tactic, streams[i].get(), workspaces[i].get(), outs[i].get());
        if (!complaint.empty()) return "ERROR " + complaint;
      }
    }
    check(cudaDeviceSynchronize(), "two streams");
    for (int i = 0; i < 2; ++i) {
      const std::vector<Bf16> result = download(outs[i], static_cast<int64_t>(expected.size()));
      if (std::memcmp(result.data(), expected.data(), result.size() * sizeof(Bf16)))
        return " WRONG";
    }
    return "";
  }

  // Median milliseconds.
  float measure(const std::string& tactic) {
    const auto begin = create<CUevent_st>(cudaEventCreate, cudaEventDestroy);
    const auto end = create<CUevent_st>(cudaEventCreate, cudaEventDestroy);
    const auto graph = capture(tactic);
    std::vector<float> times(11);
    for (float& time : times) {
      check(cudaEventRecord(begin.get(), stream_.get()), "cudaEventRecord");
      check(cudaGraphLaunch(graph.get(), stream_.get()), "cudaGraphLaunch");
      check(cudaEventRecord(end.get(), stream_.get()), "cudaEventRecord");
      check(cudaEventSynchronize(end.get()), "replay");
      check(cudaEventElapsedTime(&time, begin.get(), end.get()), "elapsed time");
    }
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  }

 private:
  bool gated() const { return cuda::is_gated(features_.activation); }
  MlpShape shape() const {
    return {tokens_, layer_.hidden, layer_.intermediate, layer_.experts, layer_.top_k};
  }
  int64_t workspace_bytes() const { return mlp_workspace_bytes(format_, shape(), gated()); }
  Matrices gate_up() const {
    return {11, layer_.experts, (gated() ? 2 : 1) * layer_.intermediate, layer_.hidden, format_};
  }
  Matrices down() const {
    return {911, layer_.experts, layer_.hidden, layer_.intermediate, format_};
  }
  std::shared_ptr<float> biases(int columns) {
    std::vector<float> values(int64_t{layer_.experts} * columns);
    for (float& v : values) v = static_cast<float>(random_() % 2001) / 2000.0f - 0.5f;
    return upload(values);
  }

  std::shared_ptr<CUgraphExec_st> capture(const std::string& tactic) const {
    cudaGraph_t graph = nullptr;
    cudaGraphExec_t exec = nullptr;
    check(cudaStreamBeginCapture(stream_.get(), cudaStreamCaptureModeGlobal), "begin capture");
    const std::string complaint = enqueue(tactic, stream_.get());
    if (!complaint.empty()) die(complaint);
    check(cudaStreamEndCapture(stream_.get(), &graph), "end capture");
    const auto owner = own(graph, cudaGraphDestroy);
    check(cudaGraphInstantiate(&exec, graph, 0), "cudaGraphInstantiate");
    return own(exec, cudaGraphExecDestroy);
  }

  // All bits set are NaN in every float: shows what is read too early, or never written.
  std::string run_poisoned(const std::string& tactic, std::vector<Bf16>* result) {
    const int64_t values = int64_t{tokens_} * layer_.hidden;
    check(cudaMemset(workspace_.get(), 0xff, workspace_bytes()), "cudaMemset");
    check(cudaMemset(out_.get(), 0xff, values * sizeof(Bf16)), "cudaMemset");
    std::string complaint;
    if (features_.graph) {
      const auto graph = capture(tactic);
      for (int i = 0; i < 2; ++i) {
        check(cudaGraphLaunch(graph.get(), stream_.get()), "cudaGraphLaunch");
      }
    } else {
      complaint = enqueue(tactic, stream_.get());
    }
    check(cudaStreamSynchronize(stream_.get()), "moe_mlp");
    *result = download(out_, values);
    return complaint;
  }

  // No token has an expert of this shard: all results are zeros.
  bool nobody_is_here() const {
    const auto end = ids_.begin() + int64_t{tokens_} * layer_.top_k;
    return std::none_of(ids_.begin(), end, [this](int32_t id) {
      return id >= features_.offset && id < features_.offset + layer_.experts;
    });
  }

  // From float64, on all tokens or, where they are many, some with the last.
  Distance distance_from_reference(const std::vector<Bf16>& result) {
    const int first = features_.extreme == Extreme::kNonfinite ? 2 : 0;
    const int count = std::min(tokens_ - first, 16);
    std::vector<int> tokens(count, tokens_ - 1);
    for (int i = 0; i + 1 < count; ++i) {
      tokens[i] = count == tokens_ - first ? first + i : first + random_() % (tokens_ - first);
    }
    const auto device_tokens = upload(tokens);
    const int hidden = layer_.hidden, intermediate = layer_.intermediate, k = layer_.top_k;
    const int pairs = count * k, width = gate_up().outputs;
    const Chosen chosen{device_tokens.get(), count,         k, device_ids_.get(), weights_.get(),
                        features_.offset,    layer_.experts};
    const auto x = allocate<float>(int64_t{count} * hidden), gx = allocate<float>(count);
    const auto h = allocate<float>(int64_t{pairs} * intermediate), gh = allocate<float>(pairs);
    const auto xq = allocate<double>(int64_t{count} * hidden);
    const auto hq = allocate<double>(int64_t{pairs} * intermediate);
    const auto d1 = allocate<double>(int64_t{pairs} * width);
    const auto d2 = allocate<double>(int64_t{pairs} * hidden);
    const auto y = allocate<double>(int64_t{count} * hidden);
    const auto grid = [](int columns, int rows) { return dim3((columns + 127) / 128, rows); };
    reference_input<<<count, 128>>>(x_.get(), hidden, chosen, features_.weight_on_input, x.get());
    reference_quantize<<<count, 128>>>(format_, hidden, gate_up_scale_.get(), x.get(), xq.get(),
                                       gx.get());
    reference_product<<<grid(width, pairs), 128>>>(gate_up(), xq.get(), k, chosen, d1.get());
    reference_hidden<<<grid(intermediate, pairs), 128>>>(
        d1.get(), intermediate, gated(), k, gate_up_global_.get(), gx.get(), gate_up_bias_.get(),
        {features_.activation, params_.get()}, chosen, h.get());
    reference_quantize<<<pairs, 128>>>(format_, intermediate, down_scale_.get(), h.get(), hq.get(),
                                       gh.get());
    reference_product<<<grid(hidden, pairs), 128>>>(down(), hq.get(), 1, chosen, d2.get());
    reference_combine<<<grid(hidden, count), 128>>>(d2.get(), hidden, down_global_.get(), gh.get(),
                                                    down_bias_.get(), !features_.weight_on_input,
                                                    chosen, y.get());
    check(cudaDeviceSynchronize(), "reference");
    const std::vector<double> expected = download(y, int64_t{count} * hidden);
    Distance distance;
    for (size_t i = 0; i < expected.size(); ++i) {
      const int64_t token = tokens[i / hidden];
      distance.add(__bfloat162float(result[token * hidden + i % hidden]), expected[i]);
    }
    return distance.finished();
  }

  const Layer layer_;
  const Format format_;
  const int tokens_;
  const Features features_;
  std::mt19937 random_{3};
  std::vector<int32_t> ids_;
  std::shared_ptr<int32_t> device_ids_, offset_;
  std::shared_ptr<float> weights_, params_, gate_up_global_, down_global_;
  std::shared_ptr<float> gate_up_bias_, down_bias_, gate_up_scale_, down_scale_;
  std::shared_ptr<uint8_t> gate_up_, down_, workspace_;
  std::shared_ptr<Bf16> x_, out_;
  std::shared_ptr<CUstream_st> stream_ = create<CUstream_st>(cudaStreamCreate, cudaStreamDestroy);
};

bool report(const std::string& wrong) {
  std::printf("%s\n", wrong.c_str());
  std::fflush(stdout);
  return wrong.empty();
}

std::string shown(Format format, const std::string& tactic, int64_t rows, int64_t experts) {
  return tactic.empty() ? default_tactic(format, rows, experts) : tactic;
}

Format parse_format(const std::string& name) {
  for (int i = 0; i < 2; ++i) {
    if (name == kFormats[i]) return static_cast<Format>(i);
  }
  die("format '" + name + "' is neither nvfp4 nor mxfp4");
}

bool run_layers(const std::string& layers, const std::string& formats, const std::string& counts,
                const std::string& names, bool timed) {
  bool right = true;
  for (const std::string& layer_name : split(layers)) {
    const Layer layer = parse_layer(layer_name);
    for (const std::string& format_name : split(formats)) {
      const Format format = parse_format(format_name);
      for (const std::string& count : split(counts)) {
        const int tokens = std::atoi(count.c_str());
        Problem problem(layer, format, tokens, {});
        std::vector<std::string> tactic_names = split(names);
        if (names == "all") {
          tactic_names.clear();
          for (const TacticInfo& info : tactics(format)) tactic_names.push_back(info.name);
        }
        for (const std::string& name : tactic_names) {
          const std::string tactic = name == "auto" ? "" : name;
          std::printf("%-15s %-6s T=%-5d %-6s", layer.name.c_str(), format_name.c_str(), tokens,
                      shown(format, tactic, int64_t{tokens} * layer.top_k, layer.experts).c_str());
          std::fflush(stdout);  // says which case it was if the kernel hangs
          const std::string wrong = problem.verify(tactic);
          if (timed && wrong.empty()) std::printf("  %9.1f us", problem.measure(tactic) * 1e3);
          right &= report(wrong);
        }
      }
    }
  }
  return right;
}

// Rows that are sorted already, with groups before and after those of this shard.
bool run_grouped(const std::string& name, Format format, bool with_bias) {
  const int experts = 5, n = 264, k = format == Format::kNvfp4 ? 416 : 448, first = 2;
  const std::vector<int32_t> sizes{3, 40, 129, 0, 1, 66, 0, 7};
  const int rows = 3 + 40 + 129 + 1 + 66 + 7 + 9, begin = 43, end = begin + 129 + 1 + 66;
  const Matrices m{5, experts, n, k, format};
  const auto w = packed(m);
  const auto global = upload(global_scales(m));
  const auto x = allocate<Bf16>(int64_t{rows} * k), out = allocate<Bf16>(int64_t{rows} * n);
  fill_input<<<64, 256>>>(x.get(), rows, k, Extreme::kNone);
  std::vector<float> bias(with_bias ? experts * n : 0);
  for (size_t i = 0; i < bias.size(); ++i) bias[i] = static_cast<float>(i % 17) / 8.0f - 1.0f;
  const auto device_bias = with_bias ? upload(bias) : nullptr;
  const auto device_sizes = upload(sizes), offset = upload(std::vector<int32_t>{first});
  GroupedArgs args{};
  args.shape = {rows, n, k, experts, static_cast<int64_t>(sizes.size())};
  args.format = format;
  args.x = x.get();
  args.w = w.get();
  args.w_global = global.get();
  args.bias = device_bias.get();
  args.group_sizes = device_sizes.get();
  args.group_offset = offset.get();
  args.out = out.get();
  const int64_t bytes = grouped_workspace_bytes(format, args.shape);
  const auto workspace = allocate<uint8_t>(bytes);
  check(cudaMemset(workspace.get(), 0xff, bytes), "cudaMemset");
  check(cudaMemset(out.get(), 0xff, int64_t{rows} * n * 2), "cudaMemset");
  std::printf("grouped_matmul  %-6s %-6s%s", kFormats[static_cast<int>(format)], name.c_str(),
              with_bias ? " bias" : "");
  const std::string complaint = grouped_matmul(args, name, workspace.get(), nullptr);
  check(cudaDeviceSynchronize(), "grouped_matmul");
  if (!complaint.empty()) return report(" ERROR " + complaint);

  std::vector<int> tokens(rows);
  std::vector<int32_t> ids(rows, -1);
  int at = 0;
  for (size_t group = 0; group < sizes.size(); ++group) {
    for (int i = 0; i < sizes[group]; ++i) ids[at++] = static_cast<int32_t>(group);
  }
  for (int i = 0; i < rows; ++i) tokens[i] = i;
  const auto device_tokens = upload(tokens), device_ids = upload(ids);
  const Chosen chosen{device_tokens.get(), rows, 1, device_ids.get(), nullptr, first, experts};
  const auto v = allocate<float>(int64_t{rows} * k), g = allocate<float>(rows);
  const auto q = allocate<double>(int64_t{rows} * k), d = allocate<double>(int64_t{rows} * n);
  const auto y = allocate<double>(int64_t{rows} * n);
  reference_input<<<rows, 128>>>(x.get(), k, chosen, false, v.get());
  reference_quantize<<<rows, 128>>>(format, k, nullptr, v.get(), q.get(), g.get());
  reference_product<<<dim3(3, rows), 128>>>(m, q.get(), 1, chosen, d.get());
  reference_combine<<<dim3(3, rows), 128>>>(d.get(), n, global.get(), g.get(), device_bias.get(),
                                            false, chosen, y.get());
  check(cudaDeviceSynchronize(), "reference");
  const std::vector<double> expected = download(y, int64_t{rows} * n);
  const std::vector<Bf16> result = download(out, int64_t{rows} * n);
  Distance sums;
  bool zero = true;
  for (size_t i = 0; i < result.size(); ++i) {
    const int row = static_cast<int>(i) / n;
    sums.add(__bfloat162float(result[i]), expected[i]);
    if (row < begin || row >= end) zero &= __bfloat162float(result[i]) == 0.0f;
  }
  const Distance distance = sums.finished();
  distance.print();
  return report(distance.complaint(false) + (zero ? "" : " NOT-ZERO"));
}

bool run_feature(const char* what, const Layer& layer, Format format, int tokens,
                 const Features& features, const std::string& tactic) {
  std::printf("%-28s %-6s %-6s T=%-5d", what, kFormats[static_cast<int>(format)],
              shown(format, tactic, int64_t{tokens} * layer.top_k, layer.experts).c_str(), tokens);
  std::fflush(stdout);
  return report(Problem(layer, format, tokens, features).verify(tactic));
}

bool run_features(const std::string& formats) {
  bool right = true;
  using A = cuda::Activation;
  for (const std::string& format_name : split(formats)) {
    const Format format = parse_format(format_name);
    const Layer layer = parse_layer(format == Format::kNvfp4 ? "odd" : "odd64");
    Layer one = layer;
    one.top_k = 1;
    const auto with = [](const std::function<void(Features*)>& change) {
      Features features;
      change(&features);
      return features;
    };
    const auto check_one = [&](const char* what, const std::function<void(Features*)>& change,
                               int tokens, const Layer& l) {
      right &= run_feature(what, l, format, tokens, with(change), "");
    };
    for (const TacticInfo& info : tactics(format)) {
      right &= run_feature("hot expert, graph", layer, format, 333, with([](Features* f) {
                             f->hot = 4;
                             f->graph = true;
                           }),
                           info.name);
      right &= run_feature("all", one, format, 129, with([](Features* f) {
                             f->hot = 12;
                             f->bias = f->static_scales = f->weight_on_input = true;
                           }),
                           info.name);
      right &= run_grouped(info.name, format, info.name == std::string(tactics(format)[0].name));
    }
    const std::pair<const char*, A> activations[] = {
        {"swiglu", A::kSwiglu}, {"geglu", A::kGeglu},       {"situ", A::kSitu},
        {"relu2", A::kRelu2},   {"identity", A::kIdentity},
    };
    for (const auto& [name, kind] : activations) {
      check_one((std::string(name) + ", biases").c_str(),
                [kind = kind](Features* f) {
                  f->activation = kind;
                  f->bias = true;
                },
                65, layer);
    }
    check_one(
        "static scales", [](Features* f) { f->static_scales = true; }, 65, layer);
    check_one(
        "weight on input", [](Features* f) { f->weight_on_input = true; }, 65, one);
    check_one(
        "shard at 3", [](Features* f) { f->offset = 3; }, 65, layer);
    check_one(
        "shard at -7", [](Features* f) { f->offset = -7; }, 65, layer);
    check_one(
        "shard elsewhere", [](Features* f) { f->offset = 1000; }, 5, layer);
    check_one(
        "24 binary orders, zeros", [](Features* f) { f->extreme = Extreme::kRange; }, 65, layer);
    check_one(
        "infinity and NaN", [](Features* f) { f->extreme = Extreme::kNonfinite; }, 65, layer);
    std::printf("%-28s %-6s", "two streams", format_name.c_str());
    right &= report(Problem(layer, format, 333, {}).verify_streams(""));
  }
  return right;
}

int run(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "features" && argc == 3) return run_features(argv[2]) ? 0 : 1;
  if ((mode == "layers" || mode == "time") && argc == 6) {
    return run_layers(argv[2], argv[3], argv[4], argv[5], mode == "time") ? 0 : 1;
  }
  die("usage: check layers|time LAYERS FORMATS TOKENS TACTICS, or check features FORMATS, with "
      "commas "
      "in the lists");
}

}  // namespace
}  // namespace jaxmoe::blackwell

int main(int argc, char** argv) { return jaxmoe::blackwell::run(argc, argv); }
