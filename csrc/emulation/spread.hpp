// The tensor copy that spreads FP4 over shared memory (CU_TENSOR_MAP_DATA_TYPE_16U4_ALIGN16B): 16
// elements take 8 bytes of 16. Here the copy brings the packed rows to the start of the tile, and
// those who wait for it then spread them where they lie.
#pragma once

#include <cstdint>

#include "cute/layout.hpp"

namespace jaxmoe::emulation {

// The layout of a tile for the tensor map: packed rows, not swizzled. The tile's shape is (rows,
// K), or
// ((rows, K of an instruction), 1, instructions along K).
template <bool kSpread, class Layout>
CUTE_HOST_DEVICE constexpr auto copied_layout(Layout const& layout) {
  using namespace cute;
  if constexpr (!kSpread) {
    return layout;
  } else if constexpr (rank_v<decltype(layout.shape())> == 2) {
    return make_layout(make_shape(size<0>(layout), size<1>(layout)), LayoutRight{});
  } else {
    const auto k = size<0, 1>(layout);
    static_assert(size<1>(Layout{}) == 1);
    return make_layout(layout.shape(),
                       make_stride(make_stride(k * size<2>(layout), Int<1>{}), Int<0>{}, k));
  }
}

// A tile of `kRows` rows of 128 elements: from 64 bytes a row to 128 with the 128-byte swizzle. All
// `kThreads` threads, of which `sync` is a barrier, take part.
template <int kRows, int kThreads, class Sync>
__device__ __forceinline__ void spread_tile(void* tile, int thread, Sync sync) {
  constexpr int kChunks = kRows * 8 / kThreads;  // of 16 elements
  static_assert(kRows * 8 % kThreads == 0);
  constexpr uint32_t kUnread = 0xeeeeeeeeu;
  const uint2* packed = static_cast<const uint2*>(tile);
  uint4* spread = static_cast<uint4*>(tile);
  uint2 chunk[kChunks];
#pragma unroll
  for (int i = 0; i < kChunks; ++i) chunk[i] = packed[thread + i * kThreads];
  sync();
#pragma unroll
  for (int i = 0; i < kChunks; ++i) {
    const int at = thread + i * kThreads, row = at / 8;
    spread[row * 8 + (at % 8 ^ row % 8)] = make_uint4(chunk[i].x, chunk[i].y, kUnread, kUnread);
  }
  // The next copy to this place comes through the async proxy.
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  sync();
}

}  // namespace jaxmoe::emulation
