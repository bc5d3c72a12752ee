// cpu_avx_vnni: eight-lane f32, and integer dot products of four bytes (AVX-VNNI).
#include "cpu/isa_avx2.h"
#include "cpu/vnni.h"

namespace jaxmoe::cpu {
namespace {

struct Dpbusd : Isa {
  static JAXMOE_INLINE I dpbusd(I sum, __m256i weights, __m256i four) {
    return (I)_mm256_dpbusd_avx_epi32((__m256i)sum, weights, four);
  }
};

struct VnniIsa : WithVnni<Dpbusd> {
  static constexpr int kMaxFixedRows = kAnyRows;
};

constexpr Kernels make_table() {
  Kernels table;
  fill_f32<Isa>(table);
  fill_fixed<VnniIsa>(table);
  fill_int8<VnniIsa>(table);
  return table;
}

}  // namespace

constexpr Kernels kAvxVnniKernels = make_table();

}  // namespace jaxmoe::cpu
