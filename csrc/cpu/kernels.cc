#include "cpu/kernels.h"

namespace jaxmoe::cpu {

std::vector<Tactic> named_tactics(const Kernels& table, Compute compute) {
  const bool integers =
      compute == Compute::kW4a8 ? table.panel_int8[0] != nullptr : table.panel_fixed[0] != nullptr;
  std::vector<Tactic> found;
  for (const Tactic tactic : kNamedTactics) {
    if (tactic != Tactic::kInteger || integers) found.push_back(tactic);
  }
  return found;
}

const Kernels* kernels(Variant variant) {
  switch (variant) {
    case Variant::kPortable:
      return &kPortableKernels;
#if defined(__x86_64__)
    case Variant::kAvx2:
      return &kAvx2Kernels;
    case Variant::kAvxVnni:
      return &kAvxVnniKernels;
    case Variant::kAvx512:
      return &kAvx512Kernels;
    case Variant::kAvx512Vnni:
      return &kAvx512VnniKernels;
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
