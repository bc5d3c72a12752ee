// cpu_avx2: eight-lane f32 with FMA; a code's magnitude comes from a permute, its sign by a shift.
#include <immintrin.h>

#include "cpu/epilogue.h"
#include "cpu/kernel_f32.h"

namespace jaxmoe::cpu {
namespace {

struct Isa {
  static constexpr int kWidth = 8;
  static constexpr int kStreamRows = 4;
  static constexpr int kRowTile = 6;
  static constexpr int kColumnVectors = 2;
  using F = VectorTypes<kWidth>::F;
  using I = VectorTypes<kWidth>::I;
  using Codes = __m256i;

  static JAXMOE_INLINE F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
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

  // Two factors: 2^-127 alone would be subnormal and 2^128 infinite.
  struct E8m0 {
    F low, high;
    explicit JAXMOE_INLINE E8m0(const uint8_t* p) {
      const I bytes = (I)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
      const I exponent = bytes - 127;
      const I half = exponent >> 1;
      low = (F)((half + 127) << 23);
      high = (F)((exponent - half + 127) << 23);
    }
    JAXMOE_INLINE F times(F x) const { return x * low * high; }
  };
};

}  // namespace

void fill_avx2(Kernels& table) { fill_f32<Isa>(table); }

}  // namespace jaxmoe::cpu
