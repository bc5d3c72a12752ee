// FP4, FP8 and their scales as float32 and bf16, for the emulated matrix instructions. Each product
// of an element and its scale has at most 6 significant bits (e2m1 x e4m3) and is exact in bf16, so
// that only the order of float32 additions can differ from the instruction that is emulated.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace jaxmoe::emulation {

__device__ __forceinline__ float not_a_number() { return __uint_as_float(0x7fffffffu); }

// Bits set into the place of a float's exponent and mantissa are the value times a power of two.
__device__ __forceinline__ float from_e2m1(uint32_t code) {
  return __uint_as_float((code & 8u) << 28 | (code & 7u) << 22) * 0x1p126f;
}
__device__ __forceinline__ float from_e4m3(uint32_t code) {
  const float value = __uint_as_float((code & 0x80u) << 24 | (code & 0x7fu) << 20) * 0x1p120f;
  return (code & 0x7fu) == 0x7fu ? not_a_number() : value;
}
__device__ __forceinline__ float from_e8m0(uint32_t code) {
  const uint32_t byte = code & 0xffu;
  return byte == 0xffu ? not_a_number() : __uint_as_float(byte ? byte << 23 : 0x00400000u);
}

enum class Scale { kE4m3, kE8m0 };
template <Scale kScale>
__device__ __forceinline__ float from_scale(uint32_t code) {
  return kScale == Scale::kE4m3 ? from_e4m3(code & 0x7fu) : from_e8m0(code);
}

// The bits of two bf16, `low` in the lower half.
__device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// d += A B with A[16, 16] and B[16, 8] of bf16, one warp. K may be in any order that A and B share.
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                            uint32_t a3, uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ uint32_t lane() {
  uint32_t lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

}  // namespace jaxmoe::emulation
