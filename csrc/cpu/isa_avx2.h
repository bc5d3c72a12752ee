// The eight-lane instruction set shared by cpu_avx2 and cpu_avx_vnni: f32 with FMA; a code's
// magnitude comes from a permute, its sign by a shift. Each of their translation units includes it
// once, so that every instantiation stays inside the unit that may use it.
#ifndef JAXMOE_CSRC_CPU_ISA_AVX2_H_
#define JAXMOE_CSRC_CPU_ISA_AVX2_H_

#include <immintrin.h>

#include "cpu/epilogue.h"
#include "cpu/kernel_fixed.h"

namespace jaxmoe::cpu {
namespace {

struct Isa {
  static constexpr int kWidth = 8;
  static constexpr int kStreamRows = 4;
  static constexpr int kMaxOwnStreamRows = 3;
  static constexpr int kRowTile = 6;
  static constexpr int kColumnVectors = 2;
  using F = VectorTypes<kWidth>::F;
  using I = VectorTypes<kWidth>::I;
  using Codes = __m256i;

  static JAXMOE_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static JAXMOE_INLINE F broadcast_pair(const float* pair) {
    double bits;
    std::memcpy(&bits, pair, sizeof(bits));
    return _mm256_castpd_ps(_mm256_set1_pd(bits));
  }
  static JAXMOE_INLINE Codes load_codes(const uint8_t* p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  }

  template <int kIndex>
  static JAXMOE_INLINE F decode(Codes codes) {
    const __m256 magnitudes = _mm256_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f);
    const __m256i index = kIndex ? _mm256_srli_epi32(codes, 4 * kIndex) : codes;  // uses three bits
    const __m256i sign = _mm256_and_si256(_mm256_slli_epi32(codes, 28 - 4 * kIndex),
                                          _mm256_set1_epi32(static_cast<int>(0x80000000u)));
    return _mm256_xor_ps(_mm256_permutevar8x32_ps(magnitudes, index), _mm256_castsi256_ps(sign));
  }

  // e4m3's bits, moved to those of f16, are its value times 2^-8; the conversion ignores DAZ.
  static JAXMOE_INLINE F e4m3_scale(const uint8_t* p) {
    const __m128i wide = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    const __m128i half =
        _mm_and_si128(_mm_slli_epi16(wide, 7), _mm_set1_epi16(static_cast<short>(0xbf80)));
    return _mm256_cvtph_ps(half);
  }

  struct Weights {
    __m256i of[4];
  };

  static JAXMOE_INLINE Weights load_weights(const uint8_t* codes, int group_bytes) {
    const __m256i table = _mm256_broadcastsi128_si256(
        _mm_loadu_si128(reinterpret_cast<const __m128i*>(kUnsignedWeights)));
    const __m256i nibbles = _mm256_set1_epi8(15);
    Weights weights;
#pragma GCC unroll 2
    for (int group = 0; group < 2; ++group) {
      const __m256i dwords = load_codes(codes + group * group_bytes);
      const __m256i high = _mm256_and_si256(_mm256_srli_epi16(dwords, 4), nibbles);
      weights.of[2 * group] = _mm256_shuffle_epi8(table, _mm256_and_si256(dwords, nibbles));
      weights.of[2 * group + 1] = _mm256_shuffle_epi8(table, high);
    }
    return weights;
  }

  // Four bytes of a row in every lane.
  static JAXMOE_INLINE __m256i broadcast_four(const int8_t* bytes) {
    int32_t dword;
    std::memcpy(&dword, bytes, sizeof(dword));
    return _mm256_set1_epi32(dword);
  }

  template <Format kFormat, int kRows>
  static void stream(const uint8_t* panel, int64_t superblocks, const float* const* a, float* c);

  // Two factors: 2^-127 alone would be subnormal and 2^128 infinite.
  struct E8m0 {
    F low, high;
    explicit JAXMOE_INLINE E8m0(const uint8_t* p) {
      const I byte = (I)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
      const I half = byte << 22 & 0x7f800000;  // byte / 2 as an exponent
      low = (F)(half + (64 << 23));
      high = (F)((byte << 23) - half + (63 << 23));
    }
    JAXMOE_INLINE F times(F x) const { return x * low * high; }
    JAXMOE_INLINE F accumulate(F x, F sum) const { return fma(x * low, high, sum); }
  };
};

// Up to three rows. A byte shuffle looks up 32 codes at a time: two of them give the high and the
// low bytes of bf16 values, which interleaved and widened are f32. A vector then holds four lanes x
// the codes (j, j + 4), to be multiplied by such a pair of the row, and a horizontal add restores
// the order of the lanes.
template <Format kFormat, int kRows>
void Isa::stream(const uint8_t* panel, int64_t superblocks, const float* const* a, float* c) {
  constexpr int kBlock = block_size(kFormat);
  constexpr int kGroups = kBlock / 8;
  constexpr int kVectors = kPanelLanes / kWidth;
  constexpr int kBytes = superblock_bytes(kFormat);
  alignas(16) static constexpr uint8_t kHighBytes[16] = {0x00, 0x3f, 0x3f, 0x3f, 0x40, 0x40,
                                                         0x40, 0x40, 0x80, 0xbf, 0xbf, 0xbf,
                                                         0xc0, 0xc0, 0xc0, 0xc0};
  alignas(16) static constexpr uint8_t kLowBytes[16] = {0x00, 0x00, 0x80, 0xc0, 0x00, 0x40,
                                                        0x80, 0xc0, 0x00, 0x00, 0x80, 0xc0,
                                                        0x00, 0x40, 0x80, 0xc0};
  const __m256i high_bytes =
      _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(kHighBytes)));
  const __m256i low_bytes =
      _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(kLowBytes)));
  const __m256i nibbles = _mm256_set1_epi8(15);
  const __m256i upper_half = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  const __m256i pair_order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);

  F sums[kVectors][kRows] = {};
  for (int64_t s = 0; s < superblocks; ++s, panel += kBytes) {
    prefetch_ahead<kBytes>(panel);
    float x[kRows][kSuperblockK];
    for (int r = 0; r < kRows; ++r) {
      for (int k = 0; k < kSuperblockK; k += 8) {
        const __m256 ordered = _mm256_loadu_ps(a[r] + s * kSuperblockK + k);
        _mm256_storeu_ps(x[r] + k, _mm256_permutevar8x32_ps(ordered, pair_order));
      }
    }
    const uint8_t* codes = panel + scale_bytes(kFormat);
    for (int b = 0; b < kSuperblockK / kBlock; ++b) {
      for (int v = 0; v < kVectors; ++v) {
        F first[kRows] = {}, second[kRows] = {};  // lanes 0, 1, 4, 5 and 2, 3, 6, 7
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; ++g) {
          const int k = b * kBlock + g * 8;
          const __m256i dwords = load_codes(codes + (k / 8 * kPanelLanes + v * kWidth) * 4);
          unroll(std::make_integer_sequence<int, 2>{}, [&](auto odd) JAXMOE_LAMBDA {
            const __m256i index =
                _mm256_and_si256(odd ? _mm256_srli_epi16(dwords, 4) : dwords, nibbles);
            const __m256i high = _mm256_shuffle_epi8(high_bytes, index);
            const __m256i low = _mm256_shuffle_epi8(low_bytes, index);
            const __m256i words1 = _mm256_unpacklo_epi8(low, high);
            const __m256i words2 = _mm256_unpackhi_epi8(low, high);
            // Even words are the codes (j, j + 4) of j = odd, odd words those of j = odd + 2.
            const __m256 near1 = _mm256_castsi256_ps(_mm256_slli_epi32(words1, 16));
            const __m256 near2 = _mm256_castsi256_ps(_mm256_slli_epi32(words2, 16));
            const __m256 far1 = _mm256_castsi256_ps(_mm256_and_si256(words1, upper_half));
            const __m256 far2 = _mm256_castsi256_ps(_mm256_and_si256(words2, upper_half));
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
              const __m256 near_x = broadcast_pair(x[r] + k + 2 * odd);
              const __m256 far_x = broadcast_pair(x[r] + k + 2 * (odd + 2));
              first[r] = _mm256_fmadd_ps(near1, near_x, first[r]);
              second[r] = _mm256_fmadd_ps(near2, near_x, second[r]);
              first[r] = _mm256_fmadd_ps(far1, far_x, first[r]);
              second[r] = _mm256_fmadd_ps(far2, far_x, second[r]);
            }
          });
        }
        const BlockScale<Isa, kFormat> scale(panel + b * kPanelLanes + v * kWidth);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          sums[v][r] = scale.accumulate(_mm256_hadd_ps(first[r], second[r]), sums[v][r]);
        }
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kVectors; ++v) {
      _mm256_storeu_ps(c + r * kPanelLanes + v * kWidth, sums[v][r]);
    }
  }
}

}  // namespace
}  // namespace jaxmoe::cpu

#endif  // JAXMOE_CSRC_CPU_ISA_AVX2_H_
