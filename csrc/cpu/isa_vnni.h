// The sixteen-lane instruction set with integer dot products (VNNI) and byte permutes (VBMI).
#ifndef JAXMOE_CSRC_CPU_ISA_VNNI_H_
#define JAXMOE_CSRC_CPU_ISA_VNNI_H_

#include "cpu/isa_avx512.h"
#include "cpu/kernel_fixed.h"

namespace jaxmoe::cpu {
namespace {

struct VnniIsa : Isa {
  static constexpr int kVectorsTogether = 2;
  static constexpr int kMaxFixedRows = 4;
  struct Weights {
    __m512i of[4];
  };

  static JAXMOE_INLINE Weights load_weights(const uint8_t* codes, int group_bytes) {
    // The permute reads six bits of each index, so that two of them may be of the next code.
    const __m512i table =
        _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(kUnsignedWeights)));
    Weights weights;
#pragma GCC unroll 2
    for (int group = 0; group < 2; ++group) {
      const __m512i dwords = _mm512_loadu_si512(codes + group * group_bytes);
      weights.of[2 * group] = _mm512_permutexvar_epi8(dwords, table);
      weights.of[2 * group + 1] = _mm512_permutexvar_epi8(_mm512_srli_epi16(dwords, 4), table);
    }
    return weights;
  }

  static JAXMOE_INLINE void dot(const Weights (&weights)[2], const FixedBlock& x, I (&sums)[2]) {
    __m512i sum0 = _mm512_setzero_si512(), sum1 = sum0;
    add(weights, x.high, sum0, sum1);
    const __m512i correction = _mm512_set1_epi32(x.correction);
    sum0 = _mm512_add_epi32(_mm512_slli_epi32(sum0, 8), correction);
    sum1 = _mm512_add_epi32(_mm512_slli_epi32(sum1, 8), correction);
    add(weights, x.low, sum0, sum1);
    sums[0] = (I)sum0;
    sums[1] = (I)sum1;
  }

  static JAXMOE_INLINE void dot(const Weights (&weights)[2], const Int8Block& x, I (&sums)[2]) {
    __m512i sum0 = _mm512_set1_epi32(x.start), sum1 = sum0;
    add(weights, x.values, sum0, sum1);
    sums[0] = (I)sum0;
    sums[1] = (I)sum1;
  }

 private:
  static JAXMOE_INLINE void add(const Weights (&weights)[2], const int8_t* bytes, __m512i& sum0,
                                __m512i& sum1) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      int32_t dword;
      std::memcpy(&dword, bytes + 4 * i, sizeof(dword));
      const __m512i four = _mm512_set1_epi32(dword);
      sum0 = _mm512_dpbusd_epi32(sum0, weights[0].of[i], four);
      sum1 = _mm512_dpbusd_epi32(sum1, weights[1].of[i], four);
    }
  }
};

}  // namespace
}  // namespace jaxmoe::cpu

#endif  // JAXMOE_CSRC_CPU_ISA_VNNI_H_
