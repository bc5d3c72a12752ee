// The sixteen-lane instruction set with integer dot products (VNNI) and byte permutes (VBMI).
#ifndef JAXMOE_CSRC_CPU_ISA_VNNI_H_
#define JAXMOE_CSRC_CPU_ISA_VNNI_H_

#include "cpu/isa_avx512.h"
#include "cpu/kernel_fixed.h"

namespace jaxmoe::cpu {
namespace {

struct VnniIsa : Isa {
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

  static JAXMOE_INLINE I dot(const Weights& weights, const FixedBlock& x) {
    __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum = _mm512_dpbusd_epi32(sum, weights.of[i], four(x.high, i));
    sum = _mm512_add_epi32(_mm512_slli_epi32(sum, 8), _mm512_set1_epi32(x.correction));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) sum = _mm512_dpbusd_epi32(sum, weights.of[i], four(x.low, i));
    return (I)sum;
  }

 private:
  static JAXMOE_INLINE __m512i four(const int8_t* bytes, int index) {
    int32_t dword;
    std::memcpy(&dword, bytes + 4 * index, sizeof(dword));
    return _mm512_set1_epi32(dword);
  }
};

}  // namespace
}  // namespace jaxmoe::cpu

#endif  // JAXMOE_CSRC_CPU_ISA_VNNI_H_
