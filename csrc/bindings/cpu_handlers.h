// The XLA FFI handlers of the CPU library.
#ifndef JAXMOE_CSRC_BINDINGS_CPU_HANDLERS_H_
#define JAXMOE_CSRC_BINDINGS_CPU_HANDLERS_H_

#include "xla/ffi/api/ffi.h"

XLA_FFI_DECLARE_HANDLER_SYMBOL(jaxmoe_moe_mlp_cpu_v1);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jaxmoe_grouped_matmul_cpu_v1);

#endif  // JAXMOE_CSRC_BINDINGS_CPU_HANDLERS_H_
