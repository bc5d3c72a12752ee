// Panel x rows on bf16 tiles: 16 rows x 32 k of activations times 32 k x 16 lanes of weights,
// summed in f32.
//
// A chunk of 1 to 4 superblocks is decoded into L1 (4 to 16 KB, twice where the next one is decoded
// meanwhile) as tiles of weights, 1 KB per 32 k
// and 16 lanes, dword (k pair, lane) holding the bf16 pair (j, j + 4) of its group of eight. Then
// Multiply, who asks for the chunks, runs over the row tiles; unless its registers hold the
// products of all rows, they rest in c (L1/L2) between chunks. e2m1 times its block scale has at
// most 6 significant bits: exact in bf16. Three planes of activations run over the same weight
// tiles and make the product exact in f32 up to summation.
//
// Multiply::run is TDPBF16PS on AMX, or VDPBF16PS where there is none: the same blocking either
// way.
#ifndef JAXMOE_CSRC_CPU_KERNEL_TILES_H_
#define JAXMOE_CSRC_CPU_KERNEL_TILES_H_

#include <type_traits>

#include "cpu/isa_vbmi.h"

namespace jaxmoe::cpu {
namespace {

constexpr int kWeightTileBytes = 1024;  // 32 k x 16 lanes
constexpr int kMaxChunk = 4;            // superblocks
constexpr int kDecodedBytes = kSuperblockK * kPanelLanes * 2;
static_assert(2 * kMaxChunk * kDecodedBytes <= Kernels::kDecodedFloats * 4);

// e2m1 as bf16, by five index bits of which the fifth is another code's.
inline __m512i bf16_values() {
  alignas(64) static constexpr uint16_t kValues[32] = {
      0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80,
      0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0, 0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040,
      0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0};
  return _mm512_load_si512(kValues);
}

// The scaled bf16 pairs (j, j + 4) of one group and 16 lanes, by way of f32: right for every scale.
// The upper code of a dword is multiplied with the lower one still behind it, which reaches no
// further than 2^-6 of its product: less than the least of the six bits that are kept. (Behind a
// zero it is subnormal, which counts as zero: threads.cc.)
template <int kIndex, class Scale>
JAXMOE_INLINE __m512i scaled_pairs(__m512i codes, const Scale& scale) {
  const __m512i pairs = _mm512_permutexvar_epi16(
      kIndex ? _mm512_srli_epi32(codes, 4 * kIndex) : codes, bf16_values());
  const __m512i six_bits = _mm512_set1_epi32(static_cast<int>(0xfffc0000u));
  const __m512i high = (__m512i)scale.times((Isa::F)pairs);
  const __m512i low = (__m512i)scale.times((Isa::F)_mm512_slli_epi32(pairs, 16));
  return _mm512_ternarylogic_epi32(high, six_bits, _mm512_srli_epi32(low, 16), 0xea);  // a & b | c
}

// For e8m0, by adding to the exponents: right while neither end of bf16's range is reached.
template <int kIndex>
JAXMOE_INLINE __m512i shifted_pairs(__m512i codes, __m512i exponents) {
  const __m512i pairs = _mm512_permutexvar_epi16(
      kIndex ? _mm512_srli_epi32(codes, 4 * kIndex) : codes, bf16_values());
  const __mmask32 nonzero = _mm512_test_epi16_mask(pairs, _mm512_set1_epi16(0x7fff));
  return _mm512_mask_add_epi16(pairs, nonzero, pairs, exponents);
}

// NVFP4 by way of f16, where a scale is a block's e4m3 bits moved to their places (times 2^-8,
// exact, subnormals included) and a code times a scale is exact. What is then a normal number or
// zero becomes bf16 by a shift and a larger exponent; the table that adds it leaves zeros alone.
// Half multiplies 32 f16 values.
template <int kIndex, class Half>
JAXMOE_INLINE __m512i half_pairs(__m512i codes, __m512i scales) {
  constexpr uint16_t kMore = (112 - 12) << 7;  // f16's bias to bf16's; and 2^12 of the table below
  alignas(64) static constexpr uint16_t kMagnitudes[32] = {
      0, 0x6800, 0x6c00, 0x6e00, 0x7000, 0x7200, 0x7400, 0x7600,  // 2^12 |e2m1| as f16
      0, 0x6800, 0x6c00, 0x6e00, 0x7000, 0x7200, 0x7400, 0x7600,
      0, 0x6800, 0x6c00, 0x6e00, 0x7000, 0x7200, 0x7400, 0x7600,
      0, 0x6800, 0x6c00, 0x6e00, 0x7000, 0x7200, 0x7400, 0x7600};
  constexpr uint16_t kLess = kMore | 0x8000;
  alignas(64) static constexpr uint16_t kOffsets[32] = {
      0,      kMore, kMore, kMore, kMore,  kMore, kMore, kMore,  // by code, twice
      0x8000, kLess, kLess, kLess, kLess,  kLess, kLess, kLess, 0,     kMore, kMore, kMore,
      kMore,  kMore, kMore, kMore, 0x8000, kLess, kLess, kLess, kLess, kLess, kLess, kLess};
  const __m512i index = kIndex ? _mm512_srli_epi32(codes, 4 * kIndex) : codes;
  const __m512i half =
      Half::multiply_f16(_mm512_permutexvar_epi16(index, _mm512_load_si512(kMagnitudes)), scales);
  return _mm512_add_epi16(_mm512_srli_epi16(half, 3),
                          _mm512_permutexvar_epi16(index, _mm512_load_si512(kOffsets)));
}

// Marks a Multiply whose instruction set has no f16 arithmetic.
struct NoHalf {};

template <Format kFormat, class Multiply>
struct PanelTiles {
  using Scale = BlockScale<Isa, kFormat>;
  static constexpr int kBlock = block_size(kFormat);
  static constexpr int kScaleBytes = scale_bytes(kFormat);
  static constexpr int kBytes = superblock_bytes(kFormat);
  static constexpr bool kHasHalf = !std::is_same_v<typename Multiply::Half, NoHalf>;

  static void run(const uint8_t* panel, int64_t superblocks, const TileRows& a, int rows, float* c,
                  float* scratch) {
    Multiply::run(Decoder{panel}, reinterpret_cast<uint8_t*>(scratch), superblocks, a, rows, c);
  }

  // Decodes a panel into tiles, in pieces that Multiply asks for.
  struct Decoder {
    static constexpr int kGroups = kSuperblockK / 8;  // of a superblock

    const uint8_t* panel;

    // `count` superblocks from `first` on.
    JAXMOE_INLINE void superblocks(int64_t first, int count, uint8_t* tiles) const {
      for (int i = 0; i < count; ++i) {
        const uint8_t* superblock = panel + (first + i) * kBytes;
        prefetch_ahead<kBytes>(superblock);
        choose(superblock, [&](auto scales, auto pairs) JAXMOE_LAMBDA {
          decode_blocks(superblock, tiles + i * kDecodedBytes, scales, pairs);
        });
      }
    }
    // Of the superblocks from `first` on, one of the groups of eight k.
    JAXMOE_INLINE void group(int64_t first, int index, uint8_t* tiles) const {
      constexpr int kShare = (kBytes + kGroups - 1) / kGroups;
      const int s = index / kGroups, group = index % kGroups;
      const uint8_t* superblock = panel + (first + s) * kBytes;
      prefetch_ahead<kShare>(superblock + group * kShare);
      choose(superblock, [&](auto scales, auto pairs) JAXMOE_LAMBDA {
        decode_group(superblock, group, tiles + s * kDecodedBytes, scales, pairs);
      });
    }
  };

 private:
  static JAXMOE_INLINE void store_pair(uint8_t* tiles, int group, int half, int j, __m512i pairs) {
    const int k_block = group / 4, pair_row = group % 4 * 4 + j;
    _mm512_storeu_si512(tiles + (k_block * 2 + half) * kWeightTileBytes + pair_row * 64, pairs);
  }

  // A lane's scale byte, moved up by 7 bits, in both words of its dword.
  struct Words {
    __m512i words;
    explicit JAXMOE_INLINE Words(const uint8_t* bytes) {
      const __m512i wide =
          _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
      words = _mm512_or_si512(_mm512_slli_epi32(wide, 7), _mm512_slli_epi32(wide, 23));
    }
  };

  // Calls visit(scales, pairs) for the fastest way that is exact for this superblock: scales(bytes)
  // is what pairs(index, codes, scale) takes for sixteen lanes of a block.
  template <class Visit>
  static JAXMOE_INLINE void choose(const uint8_t* superblock, Visit visit) {
    const auto words = [](const uint8_t* bytes) JAXMOE_LAMBDA { return Words(bytes); };
    const __m512i bytes = _mm512_loadu_si512(superblock);
    if constexpr (kFormat == Format::kMxfp4) {
      const __m512i from_two = _mm512_sub_epi8(bytes, _mm512_set1_epi8(2));
      if (_mm512_cmpgt_epu8_mask(from_two, _mm512_set1_epi8(static_cast<char>(250))) == 0) {
        const __m512i one = _mm512_set1_epi16(127 << 7);
        return visit(words, [=](auto j, __m512i codes, const Words& scale) JAXMOE_LAMBDA {
          return shifted_pairs<j>(codes, _mm512_sub_epi16(scale.words, one));
        });
      }
    } else if constexpr (kHasHalf) {
      const __m512i least = _mm512_min_epi8(bytes, _mm512_loadu_si512(superblock + 64));
      if (_mm512_cmple_epi8_mask(least, _mm512_setzero_si512()) == 0) {  // as in every real block
        return visit(words, [](auto j, __m512i codes, const Words& scale) JAXMOE_LAMBDA {
          return half_pairs<j, typename Multiply::Half>(codes, scale.words);
        });
      }
    }
    visit([](const uint8_t* p) JAXMOE_LAMBDA { return Scale(p); },
          [](auto j, __m512i codes, const Scale& scale)
              JAXMOE_LAMBDA { return scaled_pairs<j>(codes, scale); });
  }

  template <class Scales, class Pairs>
  static JAXMOE_INLINE void decode_blocks(const uint8_t* superblock, uint8_t* tiles, Scales scales,
                                          Pairs pairs) {
    for (int block = 0; block < kSuperblockK / kBlock; ++block) {
      for (int half = 0; half < 2; ++half) {
        const auto scale = scales(superblock + block * kPanelLanes + half * 16);
#pragma GCC unroll 4
        for (int g = 0; g < kBlock / 8; ++g) {
          decode_half(superblock, block * (kBlock / 8) + g, half, tiles, scale, pairs);
        }
      }
    }
  }

  template <class Scales, class Pairs>
  static JAXMOE_INLINE void decode_group(const uint8_t* superblock, int group, uint8_t* tiles,
                                         Scales scales, Pairs pairs) {
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const auto scale = scales(superblock + group * 8 / kBlock * kPanelLanes + half * 16);
      decode_half(superblock, group, half, tiles, scale, pairs);
    }
  }

  // Eight k of sixteen lanes.
  template <class AnyScale, class Pairs>
  static JAXMOE_INLINE void decode_half(const uint8_t* superblock, int group, int half,
                                        uint8_t* tiles, const AnyScale& scale, Pairs pairs) {
    const __m512i codes = _mm512_loadu_si512(superblock + kScaleBytes + group * 128 + half * 64);
    unroll(std::make_integer_sequence<int, 4>{}, [&](auto j) JAXMOE_LAMBDA {
      store_pair(tiles, group, half, j, pairs(j, codes, scale));
    });
  }
};

// Rows into tiles, in the k order of the weights' pairs.
inline __m256i pair_order(__m256i sixteen) {
  const __m256i order = _mm256_setr_epi16(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  return _mm256_permutexvar_epi16(order, sixteen);
}

inline void store_sixteen(uint8_t* address, __m256i values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(address), pair_order(values));
}

inline void pack_tile_bf16(const uint16_t* values, int64_t n, const TileRows& tiles, int64_t row,
                           int64_t k) {
  const __m512i order = _mm512_set_epi16(31, 27, 30, 26, 29, 25, 28, 24, 23, 19, 22, 18, 21, 17, 20,
                                         16, 15, 11, 14, 10, 13, 9, 12, 8, 7, 3, 6, 2, 5, 1, 4, 0);
  int64_t i = 0;
  for (; k % TileRows::kTileK == 0 && i + TileRows::kTileK <= n; i += TileRows::kTileK) {
    _mm512_storeu_si512(tiles.at(row, k + i),
                        _mm512_permutexvar_epi16(order, _mm512_loadu_si512(values + i)));
  }
  for (; i < n; i += 16) {
    store_sixteen(tiles.at(row, k + i),
                  _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values + i)));
  }
}

// All planes but the last truncate what is left to its upper eight bits; the last one rounds. With
// three the rest fits (save for a last part below bf16's normal range).
inline void pack_tile_f32(const float* values, int64_t n, const TileRows& tiles, int64_t row,
                          int64_t k) {
  for (int64_t i = 0; i < n; i += 16) {
    uint8_t* address = tiles.at(row, k + i);
    __m512 rest = _mm512_loadu_ps(values + i);
    for (int plane = 1; plane < tiles.planes; ++plane, address += tiles.plane_stride()) {
      const __m512i bits = _mm512_castps_si512(rest);
      const __m512i upper =
          _mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
      store_sixteen(address, _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16)));
      rest = _mm512_sub_ps(rest, _mm512_castsi512_ps(upper));
    }
    store_sixteen(address, (__m256i)_mm512_cvtneps_pbh(rest));
  }
}

template <class Multiply>
constexpr void fill_tiles(Kernels& table) {
  fill_f32<Isa>(table);
  fill_fixed<VbmiIsa>(table);
  fill_int8<VbmiIsa>(table);
  table.panel_tiles[static_cast<int>(Format::kNvfp4)] = &PanelTiles<Format::kNvfp4, Multiply>::run;
  table.panel_tiles[static_cast<int>(Format::kMxfp4)] = &PanelTiles<Format::kMxfp4, Multiply>::run;
  table.pack_tile_f32 = &pack_tile_f32;
  table.pack_tile_bf16 = &pack_tile_bf16;
}

}  // namespace
}  // namespace jaxmoe::cpu

#endif  // JAXMOE_CSRC_CPU_KERNEL_TILES_H_
