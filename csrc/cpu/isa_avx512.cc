// cpu_avx512: sixteen-lane f32.
#include "cpu/isa_avx512.h"

namespace jaxmoe::cpu {

void fill_avx512(Kernels& table) { fill_f32<Isa>(table); }

}  // namespace jaxmoe::cpu
