// Each block of threads has a row: its threads read blocks of 16 or 32 numbers (those of one scale)
// into registers, agree on the largest, and write codes and scales. What does not fit into
// registers is read, or computed, once more.
#include "blackwell/numbers.cuh"
#include "blackwell/quantize.h"
#include "cuda/activations.cuh"
#include "cuda/launch.h"
#include "cuda/ptx.cuh"

namespace jaxmoe::blackwell {
namespace {

constexpr int kThreads = 128;
constexpr int kHeldNumbers = 32;  // of a thread

template <int kBlock>
__device__ __forceinline__ float largest(const float (&v)[kBlock]) {
  uint32_t most = 0;  // the bits of a NaN are larger than those of any number
#pragma unroll
  for (int i = 0; i < kBlock; ++i) most = max(most, __float_as_uint(v[i]) & 0x7fffffffu);
  return __uint_as_float(most);
}

// Of all threads of the block.
__device__ __forceinline__ float largest_of_block(uint32_t bits) {
  __shared__ uint32_t warps[kThreads / 32];
  bits = __reduce_max_sync(~0u, bits);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = bits;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < kThreads / 32; ++w) bits = max(bits, warps[w]);
  return __uint_as_float(bits);
}

// A block's codes and its scale.
template <Format kFormat>
struct Block;
template <>
struct Block<Format::kNvfp4> {
  uint2 codes{};
  uint32_t scale = 0;

  __device__ Block() = default;
  __device__ Block(const float (&v)[16], float g) : scale(to_e4m3(largest(v) / (6.0f * g))) {
    if (scale == 0) return;
    const float step = from_e4m3(scale) * g;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      codes.x |= to_e2m1(v[i] / step) << 4 * i;
      codes.y |= to_e2m1(v[i + 8] / step) << 4 * i;
    }
  }
  __device__ void store(uint8_t* row, int block) const {
    reinterpret_cast<uint2*>(row)[block] = codes;
  }
};
template <>
struct Block<Format::kMxfp4> {
  uint4 codes[2]{};
  uint32_t scale = 0;

  __device__ Block() = default;
  __device__ Block(const float (&v)[32], float) {
    // The exponent's bits are floor(log2) + 127 of a normal number, and 0 of a smaller one.
    scale = static_cast<uint32_t>(max(static_cast<int>(__float_as_uint(largest(v)) >> 23) - 8, 0));
    const float factor = __uint_as_float((254 - scale) << 23);  // 2^-(scale - 127)
    uint32_t* words = reinterpret_cast<uint32_t*>(codes);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      words[i] = to_e4m3_pair(v[4 * i] * factor, v[4 * i + 1] * factor) |
                 to_e4m3_pair(v[4 * i + 2] * factor, v[4 * i + 3] * factor) << 16;
    }
  }
  __device__ void store(uint8_t* row, int block) const {
    reinterpret_cast<uint4*>(row)[2 * block] = codes[0];
    reinterpret_cast<uint4*>(row)[2 * block + 1] = codes[1];
  }
};

// kBlock consecutive numbers.
template <int kBlock>
__device__ __forceinline__ void load(const __nv_bfloat16* from, float (&v)[kBlock]) {
#pragma unroll
  for (int i = 0; i < kBlock / 8; ++i) {
    const uint4 chunk = reinterpret_cast<const uint4*>(from)[i];
    const uint32_t words[4] = {chunk.x, chunk.y, chunk.z, chunk.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      v[8 * i + 2 * j] = cuda::Pair<__nv_bfloat16>::low(words[j]);
      v[8 * i + 2 * j + 1] = cuda::Pair<__nv_bfloat16>::high(words[j]);
    }
  }
}
template <int kBlock>
__device__ __forceinline__ void load(const float* from, float (&v)[kBlock]) {
#pragma unroll
  for (int i = 0; i < kBlock; ++i) v[i] = from[i];
}

// A source of rows: `start(row)` says whether there is anything to do, `read(block, v)` gets a
// block of the row, `copies()` and `position(j)` say where it goes.
struct Input {
  QuantizeInput args;
  int k;
  int row = 0;
  float weight = 1.0f;

  __device__ bool start(int block_row) {
    row = block_row;
    if (args.row_weight) weight = args.row_weight[row];
    return args.position_of || args.expert_of[row] >= 0;
  }
  template <int kBlock>
  __device__ void read(int block, float (&v)[kBlock]) const {
    load(static_cast<const __nv_bfloat16*>(args.x) + int64_t{row} * k + block * kBlock, v);
    if (args.row_weight == nullptr) return;
#pragma unroll
    for (int i = 0; i < kBlock; ++i) v[i] *= weight;
  }
  __device__ int copies() const { return args.copies; }
  __device__ int position(int j) const {
    return args.position_of ? args.position_of[int64_t{row} * args.copies + j] : row;
  }
};

enum class Kind { kPlain, kGated, kSwiglu };

template <Kind kKind>
struct Hidden {
  QuantizeHidden args;
  int k;
  int row = 0, expert = 0;
  float scale = 0.0f;
  float params[3]{};

  static constexpr int kParts = kKind == Kind::kPlain ? 1 : 2;

  __device__ bool start(int block_row) {
    row = block_row;
    expert = args.expert_of[row];
    if (expert < 0) return false;
    scale = args.global_scale[expert] * args.product_scale[row];
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      if (i < args.num_params) params[i] = args.params[i * args.experts + expert];
    }
    return true;
  }
  template <int kBlock>
  __device__ void part(int block, int which, float (&v)[kBlock]) const {
    const int column = which * k + block * kBlock;
    load(static_cast<const __nv_bfloat16*>(args.product) + int64_t{row} * kParts * k + column, v);
    float bias[kBlock] = {};
    if (args.bias) load(args.bias + int64_t{expert} * kParts * k + column, bias);
#pragma unroll
    for (int i = 0; i < kBlock; ++i) v[i] = v[i] * scale + bias[i];
  }
  template <int kBlock>
  __device__ void read(int block, float (&v)[kBlock]) const {
    part(block, 0, v);
    if constexpr (kKind == Kind::kPlain) {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) v[i] = cuda::activate_plain(args.activation, v[i]);
    } else {
      float up[kBlock];
      part(block, 1, up);
#pragma unroll
      for (int i = 0; i < kBlock; ++i) {
        v[i] = kKind == Kind::kSwiglu ? cuda::swiglu(v[i], up[i], params)
                                      : cuda::activate_gated(args.activation, v[i], up[i], params);
      }
    }
  }
  __device__ int copies() const { return 1; }
  __device__ int position(int) const { return row; }
};

template <Format kFormat, class Source>
__global__ void __launch_bounds__(kThreads) quantize_kernel(Source source, QuantizedRows to) {
  cuda::grid_launch_dependents();
  cuda::grid_wait();
  if (!source.start(blockIdx.x)) return;
  constexpr int kBlock = block_size(kFormat);
  constexpr int kHeld = kHeldNumbers / kBlock;
  const int blocks = to.k / kBlock;
  const int tiles = static_cast<int>(scale_tiles(kFormat, to.k));
  const bool is_static = to.input_scale != nullptr;
  const float input_scale = is_static ? *to.input_scale : 1.0f;
  const auto read = [&](int block, float(&v)[kBlock]) {
    source.read(block, v);
    if (kFormat == Format::kMxfp4 && is_static) {
#pragma unroll
      for (int i = 0; i < kBlock; ++i) v[i] = v[i] / input_scale;
    }
  };

  float held[kHeld][kBlock];
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int block = threadIdx.x + i * kThreads;
    if (block >= blocks) continue;
    read(block, held[i]);
    most = max(most, __float_as_uint(largest(held[i])));
  }
  for (int block = threadIdx.x + kHeld * kThreads; block < blocks; block += kThreads) {
    float v[kBlock];
    read(block, v);
    most = max(most, __float_as_uint(largest(v)));
  }
  const float amax = largest_of_block(most);
  const bool finite = __float_as_uint(amax) < 0x7f800000u;

  float g = input_scale;
  if (kFormat == Format::kNvfp4 && !is_static) {
    g = amax / 2688.0f;
    if (g == 0.0f) g = 1.0f;
  }
  if (threadIdx.x == 0) {
    for (int j = 0; j < source.copies(); ++j) {
      const int position = source.position(j);
      if (position >= 0) to.row_scale[position] = finite ? g : __uint_as_float(0x7fffffffu);
    }
  }
  const auto write = [&](int block, const Block<kFormat>& q) {
    for (int j = 0; j < source.copies(); ++j) {
      const int position = source.position(j);
      if (position < 0) continue;
      // Rows of NVFP4 end with their last block, rows of MXFP8 with their last tile.
      if (kFormat == Format::kMxfp4 || block < blocks) {
        q.store(to.codes + position * row_bytes(kFormat, to.k), block);
      }
      to.scales[scale_index(to.scale_row[position], block, tiles)] = static_cast<uint8_t>(q.scale);
    }
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int block = threadIdx.x + i * kThreads;
    if (block < blocks) write(block, finite ? Block<kFormat>(held[i], g) : Block<kFormat>());
  }
  for (int block = threadIdx.x + kHeld * kThreads; block < blocks; block += kThreads) {
    float v[kBlock];
    read(block, v);
    write(block, finite ? Block<kFormat>(v, g) : Block<kFormat>());
  }
  for (int block = blocks + threadIdx.x; block < tiles * kScaleBlocks; block += kThreads) {
    write(block, Block<kFormat>());
  }
}

template <class Source>
cudaError_t quantize(const Source& source, int rows, const QuantizedRows& to, cudaStream_t stream) {
  const auto kernel = to.format == Format::kNvfp4 ? quantize_kernel<Format::kNvfp4, Source>
                                                  : quantize_kernel<Format::kMxfp4, Source>;
  return cuda::launch(kernel, dim3(rows), kThreads, 0, stream, source, to);
}

}  // namespace

cudaError_t quantize_input(const QuantizeInput& input, const QuantizedRows& rows,
                           cudaStream_t stream) {
  return quantize(Input{input, rows.k}, input.rows, rows, stream);
}

cudaError_t quantize_hidden(const QuantizeHidden& hidden, const QuantizedRows& rows,
                            cudaStream_t stream) {
  if (!cuda::is_gated(hidden.activation)) {
    return quantize(Hidden<Kind::kPlain>{hidden, rows.k}, hidden.positions, rows, stream);
  }
  if (hidden.activation == cuda::Activation::kSwiglu) {
    return quantize(Hidden<Kind::kSwiglu>{hidden, rows.k}, hidden.positions, rows, stream);
  }
  return quantize(Hidden<Kind::kGated>{hidden, rows.k}, hidden.positions, rows, stream);
}

}  // namespace jaxmoe::blackwell
