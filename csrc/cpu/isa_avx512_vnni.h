// The sixteen-lane instruction set with integer dot products (AVX-512 VNNI).
#ifndef JAXMOE_CSRC_CPU_ISA_AVX512_VNNI_H_
#define JAXMOE_CSRC_CPU_ISA_AVX512_VNNI_H_

#include "cpu/isa_avx512.h"
#include "cpu/vnni.h"

namespace jaxmoe::cpu {
namespace {

struct Dpbusd : Isa {
  static JAXMOE_INLINE I dpbusd(I sum, __m512i weights, __m512i four) {
    return (I)_mm512_dpbusd_epi32((__m512i)sum, weights, four);
  }
};

struct VnniIsa : WithVnni<Dpbusd> {
  static constexpr int kMaxFixedRows = kAnyRows;
};

}  // namespace
}  // namespace jaxmoe::cpu

#endif  // JAXMOE_CSRC_CPU_ISA_AVX512_VNNI_H_
