// Tensor memory and the tcgen05 instructions of SM 100 that work on one thread block, by mma.sync
// of bf16 and global memory.
//
// Tensor memory is a place in global memory for each multiprocessor, 128 lanes of 512 words: the
// kernels take more than half of a multiprocessor's shared memory, so that no two of their blocks
// have the same place at once. What is asynchronous on SM 100 happens at once, in the warp that
// issues it, and `commit` only has to arrive at the barrier.
//
// A lane is the row of a product, or row % 32 of scales; a word of scales has those of four blocks
// along K of one row, and the words of rows 32 apart follow each other.
#pragma once

#include "emulation/mma.hpp"

namespace jaxmoe::emulation {

constexpr int kTensorLanes = 128, kTensorColumns = 512, kMostMultiprocessors = 160;
__device__ static uint32_t
    tensor_memory[size_t{kMostMultiprocessors} * kTensorLanes * kTensorColumns];

__device__ __forceinline__ volatile uint32_t* tensor_word(uint32_t lane, uint32_t column) {
  uint32_t place;
  asm volatile("mov.u32 %0, %%smid;" : "=r"(place));
  if (place >= kMostMultiprocessors) __trap();
  return tensor_memory + (size_t{place} * kTensorLanes + lane % kTensorLanes) * kTensorColumns +
         column % kTensorColumns;
}
// An address of tensor memory has the lane in its upper half; bits 30 and 31 are not part of it.
__device__ __forceinline__ uint32_t lane_of(uint32_t address) { return address >> 16 & 0x7fu; }
__device__ __forceinline__ uint32_t column_of(uint32_t address) { return address & 0xffffu; }

// All of tensor memory, from its start.
__device__ inline void tensor_allocate(uint32_t* address) {
  *address = 0;
  __syncwarp();
}

// Word `i` of tcgen05.ld.32x32b: a lane of the warp has the words of a lane of tensor memory. The
// address names the first of these.
__device__ __forceinline__ uint32_t tensor_load_32dp32b(uint32_t address, int i) {
  return *tensor_word(lane_of(address) + lane(), column_of(address) + i);
}
// Of tcgen05.ld.16x256b: lane 4 g + q has words 2 q and 2 q + 1 of lanes g and g + 8, for each
// eight words.
__device__ __forceinline__ uint32_t tensor_load_16dp256b(uint32_t address, int i) {
  return *tensor_word(lane_of(address) + lane() / 4 + i % 4 / 2 * 8,
                      column_of(address) + i / 4 * 8 + lane() % 4 * 2 + i % 2);
}

__device__ __forceinline__ uint32_t shared_word(uint32_t address) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}
__device__ __forceinline__ uint32_t shared_half_word(uint32_t address) {
  uint16_t v;
  asm volatile("ld.shared.b16 %0, [%1];" : "=h"(v) : "r"(address) : "memory");
  return v;
}

// A descriptor of a matrix in shared memory, K-major.
struct Operand {
  uint32_t start, group_stride, layout;  // of groups of eight rows

  __device__ explicit Operand(uint64_t descriptor)
      : start(static_cast<uint32_t>(descriptor & 0x3fff) << 4),
        group_stride(static_cast<uint32_t>(descriptor >> 32 & 0x3fff) << 4),
        layout(static_cast<uint32_t>(descriptor >> 61)) {}

  // Four bytes of a row, in rows of 128 bytes with the 128-byte swizzle.
  __device__ uint32_t word(int row, int byte) const {
    constexpr uint32_t kSwizzle128 = 2;
    if (layout != kSwizzle128) __trap();
    const uint32_t address = start + row / 8 * group_stride + row % 8 * 128 + byte;
    return shared_word(address ^ (address >> 3 & 0x70u));
  }
  // Four elements of FP4 that SM 100 has spread over rows of 128 bytes, where the emulation's copy
  // left them: in packed rows of 64 bytes from the start of the tile. In bits 2 to 5 of a byte
  // each.
  __device__ uint32_t spread_word(int row, int element) const {
    const uint32_t tile = start & ~127u, step = start % 128 / 2;
    const uint32_t codes = shared_half_word(tile + row * 64 + step + element / 2);
    return (codes & 0xfu) << 2 | (codes & 0xf0u) << 6 | (codes & 0xf00u) << 10 |
           (codes & 0xf000u) << 14;
  }
};

// tcgen05.cp.32x128b.warpx4 of scales: 32 rows of 16 bytes. The whole warp takes part. (The copies
// for the other three quarters of the lanes are left out: only the matrix instruction reads
// scales.)
__device__ inline void tensor_copy_scales(uint64_t source, uint32_t to) {
  const Operand from(source);
  const uint32_t row = lane();
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    *tensor_word(lane_of(to) + row, column_of(to) + j) =
        shared_word(from.start + row / 8 * from.group_stride + row % 8 * 16 + j * 4);
  }
  __syncwarp();
}

enum class Kind { kFp4, kFp4Fp8 };  // mxf4nvf4 of e2m1, mxf8f6f4 of e2m1 x e4m3

// tcgen05.mma: C[M, N] in tensor memory, + A[M, K] B[N, K]^T, K = 64 or 32.
template <int M, int N, Kind kKind>
__device__ __noinline__ void tensor_multiply(uint64_t a_descriptor, uint64_t b_descriptor,
                                             uint32_t c, bool accumulate, uint32_t instruction,
                                             uint32_t a_scales, uint32_t b_scales) {
  const Operand a_rows(a_descriptor), b_rows(b_descriptor);
  const int g = lane() / 4, q = lane() % 4;
  // With one scale for K = 32, the instruction says which byte of a word it is.
  const int a_byte = kKind == Kind::kFp4 ? 0 : instruction >> 29 & 3;
  const int b_byte = kKind == Kind::kFp4 ? 0 : instruction >> 4 & 3;
  const auto scale = [](uint32_t address, int row, int byte) {
    return *tensor_word(lane_of(address) + row % 32, column_of(address) + row / 32) >> 8 * byte;
  };
  __syncwarp();
  for (int m = g; m < M; m += 16) {
    uint32_t a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = m + 8 * (i % 2), at = 16 * (i / 2) + 4 * q;
      a[i] = kKind == Kind::kFp4 ? a_rows.word(row, at) : a_rows.spread_word(row, at);
    }
    Scales scales{scale(a_scales, m, a_byte), scale(a_scales, m + 8, a_byte), 0};
#pragma unroll 2
    for (int n = 0; n < N; n += 8) {
      const uint32_t b[2] = {b_rows.word(n + g, 4 * q), b_rows.word(n + g, 16 + 4 * q)};
      scales.column = scale(b_scales, n + g, b_byte);
      volatile uint32_t* const upper = tensor_word(lane_of(c) + m, column_of(c) + n + 2 * q);
      volatile uint32_t* const lower = upper + 8 * kTensorColumns;
      float d[4] = {};
      if (accumulate) {
        d[0] = __uint_as_float(upper[0]), d[1] = __uint_as_float(upper[1]);
        d[2] = __uint_as_float(lower[0]), d[3] = __uint_as_float(lower[1]);
      }
      if constexpr (kKind == Kind::kFp4) {
        mma_16x8x64<16, Scale::kE4m3>(d, a, b, scales);
      } else {
        mma_16x8x32(d, a, b, scales);
      }
      upper[0] = __float_as_uint(d[0]), upper[1] = __float_as_uint(d[1]);
      lower[0] = __float_as_uint(d[2]), lower[1] = __float_as_uint(d[3]);
    }
  }
  __syncwarp();
}

// tcgen05.commit: everything before it is done. One lane arrives, at the barrier of each block of
// the cluster that `blocks` has a bit for.
__device__ inline void tensor_commit(uint32_t barrier, uint32_t blocks) {
  __threadfence_block();
  __syncwarp();
  for (uint32_t block = 0; block < 16 && lane() == 0; ++block) {
    if ((blocks >> block & 1) == 0) continue;
    asm volatile(
        "{\n.reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];\n}" ::"r"(barrier),
        "r"(block)
        : "memory");
  }
  __syncwarp();
}
__device__ inline void tensor_commit(uint32_t barrier) {
  __threadfence_block();
  __syncwarp();
  if (lane() == 0) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
  }
  __syncwarp();
}

}  // namespace jaxmoe::emulation
