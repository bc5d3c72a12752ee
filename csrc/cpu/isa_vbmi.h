// The sixteen-lane instruction set with integer dot products and byte permutes (VBMI).
#ifndef JAXMOE_CSRC_CPU_ISA_VBMI_H_
#define JAXMOE_CSRC_CPU_ISA_VBMI_H_

#include "cpu/isa_avx512_vnni.h"

namespace jaxmoe::cpu {
namespace {

struct VbmiIsa : VnniIsa {
  static constexpr int kMaxFixedRows = 4;

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
};

}  // namespace
}  // namespace jaxmoe::cpu

#endif  // JAXMOE_CSRC_CPU_ISA_VBMI_H_
