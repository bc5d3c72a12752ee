// The block-scaled matrix instructions of SM 120, by mma.sync of bf16.
//
// In both, lane 4 g + q of the warp holds rows g and g + 8 of A in the even and odd registers of a
// pair, column g of B, and the sums of rows g, g + 8 and columns 2 q, 2 q + 1. The scales of row g
// are in lane 4 g, of row g + 8 in lane 4 g + 1, of column g in lane 4 g (PTX ISA, "Block
// scaling").
#pragma once

#include "emulation/numbers.hpp"

namespace jaxmoe::emulation {

struct Scales {
  uint32_t upper, lower, column;  // of rows g and g + 8, and of column g
};
__device__ __forceinline__ Scales share_scales(uint32_t a, uint32_t b) {
  const uint32_t first = lane() & ~3u;
  return {__shfl_sync(~0u, a, first), __shfl_sync(~0u, a, first + 1), __shfl_sync(~0u, b, first)};
}

// m16n8k64, e2m1 x e2m1. A register has eight elements, of which the lanes q and q + 1 of a pair
// share a block of 16, or all four lanes one of 32.
template <int kBlock, Scale kScale>
__device__ __forceinline__ void mma_16x8x64(float (&d)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2], const Scales& scales) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t block = kBlock == 16 ? 2 * half + (lane() & 3u) / 2 : half;
    const auto of_block = [&](uint32_t s) { return from_scale<kScale>(s >> 8 * block); };
    const float upper = of_block(scales.upper), lower = of_block(scales.lower);
    const float column = of_block(scales.column);
    const auto pair = [](uint32_t codes, int i, float scale) {
      return bf16_pair(from_e2m1(codes >> 4 * i) * scale, from_e2m1(codes >> 4 * (i + 1)) * scale);
    };
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      mma_16x8x16(d, pair(a[2 * half], i, upper), pair(a[2 * half + 1], i, lower),
                  pair(a[2 * half], i + 2, upper), pair(a[2 * half + 1], i + 2, lower),
                  pair(b[half], i, column), pair(b[half], i + 2, column));
    }
  }
}

// m16n8k32, e2m1 x e4m3 with one scale for a row or column. A register has four elements in bytes;
// e2m1 lies in bits 2 to 5.
__device__ __forceinline__ void mma_16x8x32(float (&d)[4], const uint32_t (&a)[4],
                                            const uint32_t (&b)[2], const Scales& scales) {
  const float upper = from_e8m0(scales.upper), lower = from_e8m0(scales.lower);
  const float column = from_e8m0(scales.column);
  const auto fp4 = [](uint32_t codes, int i, float scale) {
    return bf16_pair(from_e2m1(codes >> (8 * i + 2)) * scale,
                     from_e2m1(codes >> (8 * i + 10)) * scale);
  };
  const auto fp8 = [](uint32_t codes, int i, float scale) {
    return bf16_pair(from_e4m3(codes >> 8 * i) * scale, from_e4m3(codes >> 8 * (i + 1)) * scale);
  };
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    mma_16x8x16(d, fp4(a[2 * half], 0, upper), fp4(a[2 * half + 1], 0, lower),
                fp4(a[2 * half], 2, upper), fp4(a[2 * half + 1], 2, lower), fp8(b[half], 0, column),
                fp8(b[half], 2, column));
  }
}

// ldmatrix.m8n16.x4.b8x16.b4x16_p64: a row of a matrix is 16 elements in 8 bytes, and 8 bytes that
// are not read; lane 4 g + q gets elements 4 q ... 4 q + 3 of row g, each in the low bits of a
// byte.
__device__ __forceinline__ void load_spread_matrices(uint32_t from, uint32_t& r0, uint32_t& r1,
                                                     uint32_t& r2, uint32_t& r3) {
  uint32_t r[4];
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(from)
               : "memory");
  const uint32_t q = lane() & 3u;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = __shfl_sync(~0u, r[i], (lane() & ~3u) + q / 2) >> 16 * (q & 1u);
    r[i] = (word & 0xfu) | (word & 0xf0u) << 4 | (word & 0xf00u) << 8 | (word & 0xf000u) << 12;
  }
  r0 = r[0], r1 = r[1], r2 = r[2], r3 = r[3];
}

}  // namespace jaxmoe::emulation
