// Packed e2m1 with block scales -> exact 16-bit floats, in the registers of an A fragment.
//
// A dword holds eight elements, two (k, k + 1) for each of the four registers of an m16n8k16 A
// fragment; the element at k in the low half. Bits of an element (sign, exponent 1, exponent 0,
// mantissa) in its half:
//
//   register 0: 15, 8, 7, 6    1: 12, 5, 4, 3    2: 9, 2, 1, 0    3: 14, 11, 10, 13
//
// so that a shift and a mask bring them to the bits 15, 8, 7, 6 of a bf16: the number e2m1 *
// 2^-126, subnormal where e2m1 is. One multiplication by scale * 2^117 then yields e2m1 * scale *
// 2^-9 for bf16, exactly: a product of e2m1 and e4m3 has at most six significant bits. Eleven
// integer instructions and four multiplications for eight elements. For fp16 the bits go to 15, 11,
// 10, 9 (e2m1 * 2^-14) and the factor is scale * 2^6, or 2^15 for the largest MXFP4 scale.
#ifndef JAXMOE_CSRC_CUDA_DEQUANTIZE_CUH_
#define JAXMOE_CSRC_CUDA_DEQUANTIZE_CUH_

#include <type_traits>

#include "cuda/layout.h"
#include "cuda/ptx.cuh"

namespace jaxmoe::cuda {

// What the accumulator is multiplied by, beside the global scale: the inverse of what `dequantize`
// leaves in its products.
template <class T, Format kFormat>
inline constexpr float kUnscale = 512.0f;
template <>
inline constexpr float kUnscale<__half, Format::kNvfp4> = 256.0f;
template <>
inline constexpr float kUnscale<__half, Format::kMxfp4> = 0.5f;

// The factors of one block for rows g and g + 8, in the low and the high half; `bytes` holds the
// scale bytes of two blocks. An NVFP4 byte is `eeeeemmm`, the scale's exponent + 20 and its
// mantissa; an MXFP4 byte is the factor's bf16 exponent, 244 for the largest scale of the matrix.
template <class T, Format kFormat>
__device__ __forceinline__ uint32_t scale_factors(uint32_t bytes, int block) {
  const uint32_t b = __byte_perm(bytes, 0, block ? 0x4342 : 0x4140);
  constexpr bool kBf16 = std::is_same_v<T, __nv_bfloat16>;
  if constexpr (kFormat == Format::kNvfp4) {
    return kBf16 ? b * 16 + 0x70007000u : b * 128 + 0x04000400u;
  } else if constexpr (kBf16) {
    return b * 128;
  } else {
    // fp16 has exponents 1 ... 30: scales below 2^-29 of the largest count as zero.
    return (__vmaxu2(b, 0x00d600d6u) - 0x00d600d6u) * 1024;
  }
}

template <class T>
__device__ __forceinline__ void unpack(uint32_t x, uint32_t (&a)[4]);

template <>
__device__ __forceinline__ void unpack<__nv_bfloat16>(uint32_t x, uint32_t (&a)[4]) {
  constexpr uint32_t kMask = 0x81c081c0u;
  a[0] = x & kMask;
  a[1] = (x << 3) & kMask;
  a[2] = (x << 6) & kMask;
  a[3] = ((x << 1) & 0x80008000u) | ((x >> 3) & 0x01800180u) | ((x >> 7) & 0x00400040u);
}

template <>
__device__ __forceinline__ void unpack<__half>(uint32_t x, uint32_t (&a)[4]) {
  constexpr uint32_t kSign = 0x80008000u, kRest = 0x0e000e00u;
  a[0] = (x & kSign) | ((x << 3) & kRest);
  a[1] = ((x << 3) & kSign) | ((x << 6) & kRest);
  a[2] = ((x << 6) & kSign) | ((x << 9) & kRest);
  a[3] = ((x << 1) & kSign) | (x & 0x0c000c00u) | ((x >> 4) & 0x02000200u);
}

// The A fragment of one step: registers 0 and 2 belong to row g, 1 and 3 to row g + 8. (To splat a
// half of `factors` costs nothing: it is a modifier of the multiplication.)
template <class T>
__device__ __forceinline__ void dequantize(uint32_t x, uint32_t factors, uint32_t (&a)[4]) {
  using P = Pair<T>;
  const uint32_t low = splat_low_half(factors), high = splat_high_half(factors);
  unpack<T>(x, a);
  a[0] = P::multiply(a[0], low);
  a[1] = P::multiply(a[1], high);
  a[2] = P::multiply(a[2], low);
  a[3] = P::multiply(a[3], high);
}

// What a lane holds of its warp's part of a block, and the A fragments of the block's four steps.
template <class T, Format kFormat>
struct PackedBlock {
  uint32_t words[4];
  uint32_t scale[2];  // of two blocks of scales each

  // Addresses in shared memory: of the lane's 16 bytes of elements and of its rows' scales.
  __device__ __forceinline__ void load(uint32_t elements, uint32_t scales) {
    const uint4 v = load_shared_16(elements);
    words[0] = v.x, words[1] = v.y, words[2] = v.z, words[3] = v.w;
    if constexpr (scales_per_row(kFormat) == 4) {
      const uint2 s = load_shared_8(scales);
      scale[0] = s.x, scale[1] = s.y;
    } else {
      scale[0] = scale[1] = load_shared_4(scales);
    }
  }
  __device__ __forceinline__ void fragment(int step, uint32_t (&a)[4]) const {
    constexpr int kSteps = 4 / scales_per_row(kFormat);  // with one scale
    dequantize<T>(words[step], scale_factors<T, kFormat>(scale[step / 2], step / kSteps % 2), a);
  }
};

// ---- e4m3
// ----------------------------------------------------------------------------------------
//
// A dword holds eight elements of one row, e0 ... e3 at k = 4 c ... and e4 ... e7 sixteen later:
// the magnitude of e_i in bits 4 i ... 4 i + 2, which makes four of them selectors of a byte
// permute; the signs of e0 ... e3 in bits 7, 15, 23, 31, those of e4 ... e7 four bits below. The
// permuted bytes are the eight e4m3 numbers e2m1 * 2^d of a block with scale 2^d, -5 <= d <= 6:
// exact, and none subnormal. A scale byte is 8 (d + 6), the e4m3 bits of 0.5 * 2^d. Ten
// instructions for eight elements.

__device__ __forceinline__ void dequantize_e4m3(uint32_t x, uint32_t scales, int step,
                                                uint32_t& first, uint32_t& second) {
  const uint32_t s = __byte_perm(scales, 0, step * 0x1111);
  const uint32_t low = (s << 8) + 0x0c080000u, high = s + 0x1c181410u;  // 0 .5 1 1.5, 2 3 4 6
  const uint32_t selectors = x & 0x77777777u;
  first = __byte_perm(low, high, selectors) | (x & 0x80808080u);
  second = __byte_perm(low, high, selectors >> 16) | ((x << 4) & 0x80808080u);
}

template <class T>
struct PackedBlock<T, Format::kMxfp4Fp8> {
  uint32_t words[2][4];  // rows g and g + 8
  uint32_t scale[2];     // of four blocks each

  __device__ __forceinline__ void load(uint32_t elements, uint32_t scales) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint4 v = load_shared_16(elements + r * (element_bytes(Format::kMxfp4Fp8) / 2));
      words[r][0] = v.x, words[r][1] = v.y, words[r][2] = v.z, words[r][3] = v.w;
    }
    const uint2 s = load_shared_8(scales);
    scale[0] = s.x, scale[1] = s.y;
  }
  __device__ __forceinline__ void fragment(int step, uint32_t (&a)[4]) const {
    dequantize_e4m3(words[0][step], scale[0], step, a[0], a[2]);
    dequantize_e4m3(words[1][step], scale[1], step, a[1], a[3]);
  }
};

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_CSRC_CUDA_DEQUANTIZE_CUH_
