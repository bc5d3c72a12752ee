#include "cpu/kernels.h"

namespace jaxmoe::cpu {
namespace {

struct Entry {
  Variant variant;
  void (*fill)(Kernels&);
};
constexpr Entry kEntries[] = {
    {Variant::kPortable, &fill_portable},
#if defined(__x86_64__)
    {Variant::kAvx2, &fill_avx2},
    {Variant::kAvx512, &fill_avx512},
    {Variant::kAvx512Bf16, &fill_avx512_bf16},
    {Variant::kAmx, &fill_amx},
#endif
};

struct Tables {
  Kernels tables[kNumVariants];
  bool built[kNumVariants] = {};

  Tables() {
    for (const Entry& entry : kEntries) {
      const int index = static_cast<int>(entry.variant);
      entry.fill(tables[index]);
      built[index] = true;
    }
  }
};

}  // namespace

std::vector<Tactic> named_tactics(const Kernels& table) {
  std::vector<Tactic> found;
  for (const Tactic tactic : kNamedTactics) {
    if (tactic != Tactic::kInteger || table.panel_fixed[0]) found.push_back(tactic);
  }
  return found;
}

const Kernels* kernels(Variant variant) {
  static const Tables tables;
  const int index = static_cast<int>(variant);
  return tables.built[index] ? &tables.tables[index] : nullptr;
}

}  // namespace jaxmoe::cpu
