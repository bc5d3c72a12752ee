// cpu_avx512_vnni: sixteen-lane f32, and integer dot products of four bytes (AVX-512 VNNI).
#include "cpu/isa_avx512_vnni.h"

namespace jaxmoe::cpu {
namespace {

constexpr Kernels make_table() {
  Kernels table;
  fill_f32<Isa>(table);
  fill_fixed<VnniIsa>(table);
  fill_int8<VnniIsa>(table);
  return table;
}

}  // namespace

constexpr Kernels kAvx512VnniKernels = make_table();

}  // namespace jaxmoe::cpu
