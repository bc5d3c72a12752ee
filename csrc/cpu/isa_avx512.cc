// cpu_avx512: sixteen-lane f32.
#include "cpu/isa_avx512.h"

namespace jaxmoe::cpu {
namespace {

constexpr Kernels make_table() {
  Kernels table;
  fill_f32<Isa>(table);
  return table;
}

}  // namespace

constexpr Kernels kAvx512Kernels = make_table();

}  // namespace jaxmoe::cpu
