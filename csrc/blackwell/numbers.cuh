// float32 to FP4 and FP8 and back, in plain arithmetic: the same bits on every SM, whether it has
// instructions for these formats or not.
#ifndef JAXMOE_CSRC_BLACKWELL_NUMBERS_CUH_
#define JAXMOE_CSRC_BLACKWELL_NUMBERS_CUH_

#include <cuda_fp8.h>

#include <cstdint>

namespace jaxmoe::blackwell {

// Nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6, ties to the even code; bit 3 is the sign. At each middle
// between two codes, `>` keeps a tie at the lower code and `>=` gives it to the upper.
__device__ __forceinline__ uint32_t to_e2m1(float v) {
  const float a = fabsf(v);
  const uint32_t code = (a > 0.25f) + (a >= 0.75f) + (a > 1.25f) + (a >= 1.75f) + (a > 2.5f) +
                        (a >= 3.5f) + (a > 5.0f);
  return code | (__float_as_uint(v) >> 31) << 3;
}

// The conversion is an instruction from SM 89 on.
__device__ __forceinline__ uint32_t to_e4m3(float v) {
  return __nv_cvt_float_to_fp8(v, __NV_SATFINITE, __NV_E4M3);
}
__device__ __forceinline__ uint32_t to_e4m3_pair(float low, float high) {
  return __nv_cvt_float2_to_fp8x2(make_float2(low, high), __NV_SATFINITE, __NV_E4M3);
}
// Of a number that is neither negative nor NaN.
__device__ __forceinline__ float from_e4m3(uint32_t code) {
  return __uint_as_float(code << 20) * 0x1p120f;
}

}  // namespace jaxmoe::blackwell

#endif  // JAXMOE_CSRC_BLACKWELL_NUMBERS_CUH_
