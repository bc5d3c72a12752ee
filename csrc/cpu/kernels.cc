#include "cpu/kernels.h"

namespace jaxmoe::cpu {

const Kernels* kernels(Variant variant) {
  switch (variant) {
    case Variant::kPortable:
      return &kPortableKernels;
#if defined(__x86_64__)
    case Variant::kAvx2:
      return &kAvx2Kernels;
    case Variant::kAvx512:
      return &kAvx512Kernels;
    case Variant::kAvx512Bf16:
      return &kAvx512Bf16Kernels;
    case Variant::kAmx:
      return &kAmxKernels;
#endif
    default:
      return nullptr;
  }
}

}  // namespace jaxmoe::cpu
