// Panel x rows on bf16 tiles: 16 rows x 32 k of activations times 32 k x 16 lanes of weights,
// summed in f32.
//
// A chunk of 2 to 4 superblocks is decoded into L1 (8 to 16 KB) as tiles of weights, 1 KB per 32 k
// and 16 lanes, dword (k pair, lane) holding the bf16 pair (j, j + 4) of its group of eight. Then
// Multiply runs over all row tiles, keeping 32 x 32 products in its accumulators per pair of row
// tiles; between chunks the products rest in c (L1/L2). e2m1 times its block scale has at most 6
// significant bits: exact in bf16. Three planes of activations run over the same weight tiles and
// make the product exact in f32 up to summation.
//
// Multiply::run is TDPBF16PS on AMX, or VDPBF16PS where there is none: the same blocking either
// way.
#ifndef JAXMOE_CSRC_CPU_KERNEL_TILES_H_
#define JAXMOE_CSRC_CPU_KERNEL_TILES_H_

#include "cpu/isa_avx512.h"

namespace jaxmoe::cpu {
namespace {

constexpr int kWeightTileBytes = 1024;  // 32 k x 16 lanes

// e2m1 as bf16, by five index bits of which the fifth is another code's.
inline __m512i bf16_values() {
  alignas(64) static constexpr uint16_t kValues[32] = {
      0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040, 0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80,
      0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0, 0x0000, 0x3f00, 0x3f80, 0x3fc0, 0x4000, 0x4040,
      0x4080, 0x40c0, 0x8000, 0xbf00, 0xbf80, 0xbfc0, 0xc000, 0xc040, 0xc080, 0xc0c0};
  return _mm512_load_si512(kValues);
}

// The scaled bf16 pairs (j, j + 4) of one group and 16 lanes, by way of f32: right for every scale.
template <int kIndex, class Scale>
JAXMOE_INLINE __m512i scaled_pairs(__m512i codes, const Scale& scale) {
  const __m512i pairs = _mm512_permutexvar_epi16(
      kIndex ? _mm512_srli_epi32(codes, 4 * kIndex) : codes, bf16_values());
  const __m512i high_bits =
      _mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
  const __m512i high = (__m512i)scale.times((Isa::F)high_bits);
  const __m512i low = (__m512i)scale.times((Isa::F)_mm512_slli_epi32(pairs, 16));
  return _mm512_or_si512(high, _mm512_srli_epi32(low, 16));
}

// For e8m0, by adding to the exponents: right while neither end of bf16's range is reached.
template <int kIndex>
JAXMOE_INLINE __m512i shifted_pairs(__m512i codes, __m512i exponents) {
  const __m512i pairs = _mm512_permutexvar_epi16(
      kIndex ? _mm512_srli_epi32(codes, 4 * kIndex) : codes, bf16_values());
  const __mmask32 nonzero = _mm512_test_epi16_mask(pairs, _mm512_set1_epi16(0x7fff));
  return _mm512_mask_add_epi16(pairs, nonzero, pairs, exponents);
}

template <Format kFormat, class Multiply>
struct PanelTiles {
  using Scale = BlockScale<Isa, kFormat>;
  static constexpr int kBlock = block_size(kFormat);
  static constexpr int kScaleBytes = scale_bytes(kFormat);
  static constexpr int kBytes = superblock_bytes(kFormat);
  static constexpr int kPrefetchBytes = PanelF32<Isa, kFormat>::kPrefetchBytes;
  static constexpr int kGroups = kSuperblockK / 8;
  static constexpr int kMaxChunk = 4;
  static_assert(kMaxChunk * kSuperblockK * kPanelLanes * 2 <= Kernels::kDecodedFloats * 4);

  static void run(const uint8_t* panel, int64_t superblocks, const TileRows& a, int rows, float* c,
                  float* scratch) {
    if (rows <= Multiply::kMaxStreamRows)
      return Multiply::template stream<kFormat>(panel, superblocks, a, rows, c);
    uint8_t* tiles = reinterpret_cast<uint8_t*>(scratch);
    // Few rows: a smaller chunk leaves L1 to them. Many: a larger one saves trips of c.
    const int64_t step = rows <= 32 ? 2 : kMaxChunk;
    for (int64_t s = 0; s < superblocks; s += step) {
      const int64_t left = superblocks - s;
      const int chunk = static_cast<int>(left < step ? left : step);
      for (int i = 0; i < chunk; ++i)
        decode(panel + (s + i) * kBytes, tiles + i * 4 * kWeightTileBytes);
      Multiply::run(tiles, chunk * 2, a, s * 2, rows, c, s == 0);
    }
  }

 private:
  static JAXMOE_INLINE void store_pair(uint8_t* tiles, int group, int half, int j, __m512i pairs) {
    const int k_block = group / 4, pair_row = group % 4 * 4 + j;
    _mm512_storeu_si512(tiles + (k_block * 2 + half) * kWeightTileBytes + pair_row * 64, pairs);
  }

  static void decode(const uint8_t* superblock, uint8_t* tiles) {
    for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(superblock + kPrefetchBytes + i);
    if constexpr (kFormat == Format::kMxfp4) {
      const __m512i scales = _mm512_loadu_si512(superblock);
      const __m512i from_two = _mm512_sub_epi8(scales, _mm512_set1_epi8(2));
      if (_mm512_cmpgt_epu8_mask(from_two, _mm512_set1_epi8(static_cast<char>(250))) == 0) {
        return decode_shifted(superblock, tiles);
      }
    }
    for (int half = 0; half < 2; ++half) {
      for (int group = 0; group < kGroups; ++group) {
        const Scale scale(superblock + group * 8 / kBlock * kPanelLanes + half * 16);
        const __m512i codes =
            _mm512_loadu_si512(superblock + kScaleBytes + group * 128 + half * 64);
        unroll(std::make_integer_sequence<int, 4>{}, [&](auto j) JAXMOE_LAMBDA {
          store_pair(tiles, group, half, j, scaled_pairs<j>(codes, scale));
        });
      }
    }
  }

  static void decode_shifted(const uint8_t* superblock, uint8_t* tiles) {
    for (int half = 0; half < 2; ++half) {
      for (int group = 0; group < kGroups; ++group) {
        const uint8_t* bytes = superblock + group * 8 / kBlock * kPanelLanes + half * 16;
        const __m512i wide =
            _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
        const __m512i both = _mm512_or_si512(wide, _mm512_slli_epi32(wide, 16));
        const __m512i exponents =
            _mm512_slli_epi16(_mm512_sub_epi16(both, _mm512_set1_epi16(127)), 7);
        const __m512i codes =
            _mm512_loadu_si512(superblock + kScaleBytes + group * 128 + half * 64);
        unroll(std::make_integer_sequence<int, 4>{}, [&](auto j) JAXMOE_LAMBDA {
          store_pair(tiles, group, half, j, shifted_pairs<j>(codes, exponents));
        });
      }
    }
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
  for (int64_t i = 0; i < n; i += 16) {
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
void fill_tiles(Kernels& table) {
  fill_f32<Isa>(table);
  table.panel_tiles[static_cast<int>(Format::kNvfp4)] = &PanelTiles<Format::kNvfp4, Multiply>::run;
  table.panel_tiles[static_cast<int>(Format::kMxfp4)] = &PanelTiles<Format::kMxfp4, Multiply>::run;
  table.min_tile_rows = Multiply::kMinRows;
  table.max_short_tile_rows = Multiply::kMaxStreamRows;
  table.pack_tile_f32 = &pack_tile_f32;
  table.pack_tile_bf16 = &pack_tile_bf16;
}

}  // namespace
}  // namespace jaxmoe::cpu

#endif  // JAXMOE_CSRC_CPU_KERNEL_TILES_H_
