#include <cuda_fp8.h>

#include "cuda/launch.h"
#include "cuda/ptx.cuh"
#include "cuda/quantize.h"

namespace jaxmoe::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;
constexpr int kRowsForWarps = 4096;

// The largest of the bits of |x|: those of a NaN are larger than those of any number.
__device__ __forceinline__ uint32_t largest(uint32_t most, uint4 v) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) most = __vmaxu2(most, words[i] & 0x7fff7fffu);
  return most;
}

// Exponent of the scale, biased by 127, for the row's largest magnitude: 448 is 1.75 * 2^8.
__device__ __forceinline__ uint32_t scale_exponent(float most) {
  const uint32_t bits = __float_as_uint(most);
  const int exponent = static_cast<int>(bits >> 23) - 8 + ((bits & 0x7fffff) > 0x600000);
  return most == 0.0f ? 127 : max(exponent, 1);
}

// Of a normal float, rounded to nearest or to its neighbour. (A division calls a subroutine, around
// which registers would go to local memory.)
__device__ __forceinline__ float reciprocal(float x) {
  const float estimate = __fdividef(1.0f, x);
  return fmaf(estimate, fmaf(-x, estimate, 1.0f), estimate);
}

template <class T>
__device__ __forceinline__ uint2 to_e4m3(uint4 v, float factor) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  uint32_t half[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    half[i] = __nv_cvt_float2_to_fp8x2(
        make_float2(Pair<T>::low(words[i]) * factor, Pair<T>::high(words[i]) * factor),
        __NV_SATFINITE, __NV_E4M3);
  }
  return make_uint2(half[0] | half[1] << 16, half[2] | half[3] << 16);
}

// kRowWarps warps share a row: one, or the whole block of threads. A thread reads kHeld chunks of
// eight numbers once and keeps them, more than that twice.
template <class T, int kRowWarps, int kHeld>
__global__ void __launch_bounds__(kThreads) quantize_kernel(QuantizeArgs args) {
  constexpr int kLanes = kRowWarps * 32;
  __shared__ uint32_t warp_most[kWarps];
  grid_launch_dependents();
  grid_wait();
  const int lane = threadIdx.x % kLanes;
  const int row = blockIdx.x * (kThreads / kLanes) + threadIdx.x / kLanes;
  if (row >= args.rows || (args.end && row >= *args.end)) return;
  const int chunks = args.k / 8;
  const uint4* x = static_cast<const uint4*>(args.x) + int64_t{row} * chunks;

  uint4 held[kHeld];
  uint32_t most = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int chunk = lane + i * kLanes;
    held[i] = chunk < chunks ? x[chunk] : make_uint4(0, 0, 0, 0);
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) most = largest(most, held[i]);
  for (int chunk = lane + kHeld * kLanes; chunk < chunks; chunk += kLanes) {
    most = largest(most, x[chunk]);
  }
  most = __reduce_max_sync(~0u, max(most & 0xffff, most >> 16));
  if constexpr (kRowWarps > 1) {
    if (threadIdx.x % 32 == 0) warp_most[threadIdx.x / 32] = most;
    __syncthreads();
    for (int w = 0; w < kWarps; ++w) most = max(most, warp_most[w]);
  }

  const float value = Pair<T>::low(most);
  const uint32_t exponent = scale_exponent(value);
  const float scale = args.fixed ? *args.fixed : __uint_as_float(exponent << 23);
  const float factor = args.fixed ? reciprocal(scale) : __uint_as_float((254 - exponent) << 23);
  if (lane == 0) {
    const bool finite = value <= 3.4e38f;  // not if NaN
    args.scale[row] = finite ? scale : __uint_as_float(0x7fffffffu);
  }
  const int32_t* positions =
      args.position_of ? args.position_of + int64_t{row} * args.copies : nullptr;
  const auto write = [&](int chunk, uint4 v) {
    const uint2 q = to_e4m3<T>(v, factor);
    uint2* out = static_cast<uint2*>(args.out) + chunk;
    if (positions == nullptr) {
      out[int64_t{row} * chunks] = q;
      return;
    }
    for (int j = 0; j < args.copies; ++j) {
      if (positions[j] >= 0) out[int64_t{positions[j]} * chunks] = q;
    }
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int chunk = lane + i * kLanes;
    if (chunk < chunks) write(chunk, held[i]);
  }
  for (int chunk = lane + kHeld * kLanes; chunk < chunks; chunk += kLanes) write(chunk, x[chunk]);
}

template <class T>
cudaError_t quantize(const QuantizeArgs& args, cudaStream_t stream) {
  const auto with_warps = [&](auto kernel) {
    return launch(kernel, dim3((args.rows + kWarps - 1) / kWarps), kThreads, 0, stream, args);
  };
  // A warp for a row where there are rows enough, and a lane can keep its part.
  if (args.rows >= kRowsForWarps && args.k <= 8 * 8 * 32) {
    return with_warps(quantize_kernel<T, 1, 8>);
  }
  if (args.rows >= kRowsForWarps && args.k <= 12 * 8 * 32) {
    return with_warps(quantize_kernel<T, 1, 12>);
  }
  return launch(quantize_kernel<T, kWarps, 8>, dim3(args.rows), kThreads, 0, stream, args);
}

}  // namespace

cudaError_t quantize_rows(const QuantizeArgs& args, cudaStream_t stream) {
  return args.fp16 ? quantize<__half>(args, stream) : quantize<__nv_bfloat16>(args, stream);
}

}  // namespace jaxmoe::cuda
