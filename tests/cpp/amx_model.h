#ifndef JAXMOE_TESTS_CPP_AMX_MODEL_H_
#define JAXMOE_TESTS_CPP_AMX_MODEL_H_

#include "cpu/kernels.h"

namespace jaxmoe::cpu {

// Needs avx512_bf16.
const Kernels& amx_model_kernels();

}  // namespace jaxmoe::cpu

#endif  // JAXMOE_TESTS_CPP_AMX_MODEL_H_
