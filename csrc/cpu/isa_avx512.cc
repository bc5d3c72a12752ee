// cpu_avx512: sixteen-lane f32; compute="w4a8" by byte multiplies, which need no VNNI.
#include "cpu/isa_avx512.h"

namespace jaxmoe::cpu {
namespace {

struct BytesIsa : Isa {
  static constexpr int kVectorsTogether = 2;

  // Four sums of pairs stay within 16 bits: 4 * 2 * 24 * 127 < 2^15.
  static JAXMOE_INLINE void dot(const Weights (&weights)[2], const Int8Block& x, I (&sums)[2]) {
    __m512i sum0 = _mm512_setzero_si512(), sum1 = sum0;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m512i four = broadcast_four(x.values + 4 * i);
      sum0 = _mm512_add_epi16(sum0, _mm512_maddubs_epi16(weights[0].of[i], four));
      sum1 = _mm512_add_epi16(sum1, _mm512_maddubs_epi16(weights[1].of[i], four));
    }
    const __m512i ones = _mm512_set1_epi16(1), start = _mm512_set1_epi32(x.start);
    sums[0] = (I)_mm512_add_epi32(_mm512_madd_epi16(sum0, ones), start);
    sums[1] = (I)_mm512_add_epi32(_mm512_madd_epi16(sum1, ones), start);
  }
};

constexpr Kernels make_table() {
  Kernels table;
  fill_f32<Isa>(table);
  fill_int8<BytesIsa>(table);
  return table;
}

}  // namespace

constexpr Kernels kAvx512Kernels = make_table();

}  // namespace jaxmoe::cpu
