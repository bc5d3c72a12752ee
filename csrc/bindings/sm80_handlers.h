// The XLA FFI handlers of the library for every SM from 80 on.
#ifndef JAXMOE_CSRC_BINDINGS_SM80_HANDLERS_H_
#define JAXMOE_CSRC_BINDINGS_SM80_HANDLERS_H_

#include "bindings/gpu_handlers.h"

XLA_FFI_DECLARE_HANDLER_SYMBOL(jaxmoe_moe_mlp_sm80_v1);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jaxmoe_grouped_matmul_sm80_v1);

namespace jaxmoe {

extern const GpuLibrary kSm80;

}  // namespace jaxmoe

#endif  // JAXMOE_CSRC_BINDINGS_SM80_HANDLERS_H_
