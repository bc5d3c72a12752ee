// A tiny problem with a known answer, run once before a variant is used on a machine.
#ifndef JAXMOE_CSRC_CPU_SELF_TEST_H_
#define JAXMOE_CSRC_CPU_SELF_TEST_H_

#include <string>

#include "cpu/kernels.h"

namespace jaxmoe::cpu {

// "" if the kernels' numbers are right; otherwise a sentence that says how wrong they are.
// This machine must be able to run them.
std::string self_test(const Kernels& kernels);

}  // namespace jaxmoe::cpu

#endif  // JAXMOE_CSRC_CPU_SELF_TEST_H_
