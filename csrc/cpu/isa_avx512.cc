// cpu_avx512: sixteen-lane f32; compute="w4a8" by byte multiplies, which need no VNNI.
#include "cpu/isa_avx512.h"

#include "cpu/kernel_fixed.h"

namespace jaxmoe::cpu {
namespace {

struct BytesIsa : Isa {
  static constexpr int kVectorsTogether = 2;
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

  // Four sums of pairs stay within 16 bits: 4 * 2 * 24 * 127 < 2^15.
  static JAXMOE_INLINE void dot(const Weights (&weights)[2], const Int8Block& x, I (&sums)[2]) {
    __m512i sum0 = _mm512_setzero_si512(), sum1 = sum0;
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      int32_t dword;
      std::memcpy(&dword, x.values + 4 * i, sizeof(dword));
      const __m512i four = _mm512_set1_epi32(dword);
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
