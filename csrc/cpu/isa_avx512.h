// The sixteen-lane instruction set shared by all variants with AVX-512. Each of their translation
// units includes it once, so that every instantiation stays inside the unit that may use it.
#ifndef JAXMOE_CSRC_CPU_ISA_AVX512_H_
#define JAXMOE_CSRC_CPU_ISA_AVX512_H_

#include <immintrin.h>

#include "cpu/epilogue.h"
#include "cpu/kernel_fixed.h"

namespace jaxmoe::cpu {
namespace {

struct Isa {
  static constexpr int kWidth = 16;
  static constexpr int kStreamRows = 4;
  static constexpr int kMaxOwnStreamRows = 0;
  static constexpr int kRowTile = 12;
  static constexpr int kColumnVectors = 2;
  using F = VectorTypes<kWidth>::F;
  using I = VectorTypes<kWidth>::I;
  using Codes = __m512i;

  static JAXMOE_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static JAXMOE_INLINE Codes load_codes(const uint8_t* p) { return _mm512_loadu_si512(p); }

  template <int kIndex>
  static JAXMOE_INLINE F decode(Codes codes) {
    const __m512 values = _mm512_setr_ps(0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f, -0.0f,
                                         -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f);
    // The permute reads four bits of each index: no mask.
    return _mm512_permutexvar_ps(kIndex ? _mm512_srli_epi32(codes, 4 * kIndex) : codes, values);
  }

  // e4m3's bits, moved to those of f16, are its value times 2^-8; the conversion ignores DAZ.
  static JAXMOE_INLINE F e4m3_scale(const uint8_t* p) {
    const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    const __m256i half =
        _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<short>(0xbf80)));
    return _mm512_cvtph_ps(half);
  }

  struct E8m0 {
    F exponent;
    explicit JAXMOE_INLINE E8m0(const uint8_t* p)
        : exponent(_mm512_cvtepi32_ps(_mm512_sub_epi32(
              _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))),
              _mm512_set1_epi32(127)))) {}
    JAXMOE_INLINE F times(F x) const { return _mm512_scalef_ps(x, exponent); }
    JAXMOE_INLINE F accumulate(F x, F sum) const { return times(x) + sum; }
  };

  struct Weights {
    __m512i of[4];
  };

  static JAXMOE_INLINE Weights load_weights(const uint8_t* codes, int group_bytes) {
    const __m512i table =
        _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kUnsignedWeights)));
    const __m512i nibbles = _mm512_set1_epi8(15);
    Weights weights;
#pragma GCC unroll 2
    for (int group = 0; group < 2; ++group) {
      const __m512i dwords = load_codes(codes + group * group_bytes);
      const __m512i high = _mm512_and_si512(_mm512_srli_epi16(dwords, 4), nibbles);
      weights.of[2 * group] = _mm512_shuffle_epi8(table, _mm512_and_si512(dwords, nibbles));
      weights.of[2 * group + 1] = _mm512_shuffle_epi8(table, high);
    }
    return weights;
  }

  // Four bytes of a row in every lane.
  static JAXMOE_INLINE __m512i broadcast_four(const int8_t* bytes) {
    int32_t dword;
    std::memcpy(&dword, bytes, sizeof(dword));
    return _mm512_set1_epi32(dword);
  }
};

}  // namespace
}  // namespace jaxmoe::cpu

#endif  // JAXMOE_CSRC_CPU_ISA_AVX512_H_
