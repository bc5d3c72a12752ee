// From a lane's sums to finished values: scale, bias, activation. Both kernels end with it.
#ifndef JAXMOE_CSRC_CUDA_EPILOGUE_CUH_
#define JAXMOE_CSRC_CUDA_EPILOGUE_CUH_

#include "cuda/activations.cuh"
#include "cuda/dequantize.cuh"
#include "cuda/gemm.h"
#include "cuda/ptx.cuh"

namespace jaxmoe::cuda {

// What a lane needs for the rows g and g + 8 that one warp holds of a strip.
template <class T, Format kFormat, Epilogue kEpilogue>
struct Finish {
  float scale;
  float row_scale[2];  // of the rows g and g + 8, for e4m3
  float bias, bias8;
  float params[3];
  Activation activation;

  Finish() = default;
  // `warp_row`: the first of the warp's rows: of `out`'s columns, or of gate and up each.
  __device__ __forceinline__ Finish(const GemmArgs& args, int expert, int warp_row, int g)
      : scale(args.global_scale[expert]),
        row_scale{1.0f, 1.0f},
        bias(0.0f),
        bias8(0.0f),
        params{0.0f, 0.0f, 0.0f},
        activation(args.activation) {
    constexpr bool kGated = is_gated(kEpilogue);
    const int row = warp_row + g;
    if constexpr (is_fp8(kFormat)) {
      if (row < args.outputs) {
        const int warp = warp_row / (kGated ? 8 : 16);  // counted over all strips
        const uint8_t* exponents = args.weights +
                                   expert * matrix_bytes(kFormat, args.outputs, args.k, kGated) +
                                   (warp / 4 + 1) * strip_bytes(kFormat, args.k) - kStripRows;
        const uchar2 both = reinterpret_cast<const uchar2*>(exponents)[warp % 4 * 8 + g];
        row_scale[0] = power_of_two(both.x), row_scale[1] = power_of_two(both.y);
      }
    }
    if (args.bias) {
      const float* b = args.bias + int64_t{expert} * args.outputs * (kGated ? 2 : 1);
      const int second = kGated ? row : row + 8;
      if (row < args.outputs) bias = b[row];
      if (second < args.outputs) bias8 = b[kGated ? args.outputs + row : second];
    }
    if constexpr (kGated) {
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        if (i < args.num_params) params[i] = args.params[i * args.experts + expert];
      }
    }
  }

  // One warp asks for what the constructor reads of `outputs` rows from the first on: then it comes
  // from the L1 cache.
  static __device__ __forceinline__ void prefetch(const GemmArgs& args, int expert, int first,
                                                  int outputs, int lane) {
    constexpr bool kGated = is_gated(kEpilogue);
    constexpr int kOutputs = kGated ? kStripRows / 2 : kStripRows;  // of a strip
    constexpr int kLine = 32;                                       // floats of a cache line
    if (outputs <= 0) return;
    const int last = first + outputs - 1;
    if (lane == 0) prefetch_l1(args.global_scale + expert);
    if (kGated && lane < args.num_params) {
      prefetch_l1(args.params + lane * args.experts + expert);
    }
    if (is_fp8(kFormat) && lane < divide_up(outputs, kOutputs)) {
      prefetch_l1(args.weights + expert * matrix_bytes(kFormat, args.outputs, args.k, kGated) +
                  (first / kOutputs + lane + 1) * strip_bytes(kFormat, args.k) - kStripRows);
    }
    if (args.bias) {
      const float* bias = args.bias + int64_t{expert} * args.outputs * (kGated ? 2 : 1);
      for (int i = first + lane * kLine; i < last + kLine; i += 32 * kLine) {
        prefetch_l1(bias + min(i, last));
        if (kGated) prefetch_l1(bias + args.outputs + min(i, last));
      }
    }
  }

  // Sums of row g for tokens 2c, 2c + 1, then of row g + 8; `weight` multiplies each token's sums.
  // Yields one pair for a gated epilogue, else two (rows g and g + 8).
  __device__ __forceinline__ void operator()(const float* sum, float2 weight,
                                             uint32_t (&out)[2]) const {
    using P = Pair<T>;
    const float s[2] = {scale * weight.x, scale * weight.y};
    if constexpr (is_gated(kEpilogue)) {
      float h[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float gate = scaled(sum[i], s[i], 0) + bias;
        const float up = scaled(sum[2 + i], s[i], 1) + bias8;
        h[i] = kEpilogue == Epilogue::kSwiglu ? swiglu(gate, up, params)
                                              : activate_gated(activation, gate, up, params);
      }
      out[0] = P::make(h[0], h[1]);
    } else {
      float y[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        y[i] = scaled(sum[i], s[i % 2], i / 2) + (i < 2 ? bias : bias8);
        if constexpr (kEpilogue == Epilogue::kPlain) y[i] = activate_plain(activation, y[i]);
      }
      out[0] = P::make(y[0], y[1]);
      out[1] = P::make(y[2], y[3]);
    }
  }

 private:
  // One factor after the other: their product may leave float32's range where no result does. The
  // token's comes first, since x is hardly as large as float32 goes, and a row's scale may be.
  __device__ __forceinline__ float scaled(float sum, float factor, int second) const {
    if constexpr (is_fp8(kFormat)) return sum * factor * row_scale[second];
    return sum * kUnscale<T, kFormat> * factor;
  }
  // 2^(exponent - 127); an exponent of 0 is subnormal.
  static __device__ __forceinline__ float power_of_two(uint32_t exponent) {
    return __uint_as_float(exponent == 0 ? 1u << 22 : exponent << 23);
  }
};

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_CSRC_CUDA_EPILOGUE_CUH_
