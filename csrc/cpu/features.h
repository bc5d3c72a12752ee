// What the processor and the operating system offer, and what each variant needs.
#ifndef JAXMOE_CSRC_CPU_FEATURES_H_
#define JAXMOE_CSRC_CPU_FEATURES_H_

#include <string>
#include <vector>

#include "cpu/types.h"

namespace jaxmoe::cpu {

// Names of the usable features of this machine: CPUID, the OS's saved register state (XGETBV) and,
// for AMX, the kernel's permission to use tile data. Read once.
const std::vector<std::string>& cpu_features();

// Features that `variant` needs; empty for cpu_portable.
const std::vector<std::string>& required_features(Variant variant);

// Variants compiled into this library.
std::vector<Variant> built_variants();

// "" when this machine can run `variant`; otherwise a sentence that names what is missing.
std::string why_not(Variant variant);

}  // namespace jaxmoe::cpu

#endif  // JAXMOE_CSRC_CPU_FEATURES_H_
