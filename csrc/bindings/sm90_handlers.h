// The XLA FFI handlers of the Hopper library.
#ifndef JAXMOE_CSRC_BINDINGS_SM90_HANDLERS_H_
#define JAXMOE_CSRC_BINDINGS_SM90_HANDLERS_H_

#include "bindings/gpu_handlers.h"

XLA_FFI_DECLARE_HANDLER_SYMBOL(jaxmoe_moe_mlp_sm90_v1);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jaxmoe_grouped_matmul_sm90_v1);

namespace jaxmoe {

extern const GpuLibrary kSm90;

}  // namespace jaxmoe

#endif  // JAXMOE_CSRC_BINDINGS_SM90_HANDLERS_H_
