#include "bindings/sm80_handlers.h"

#include "sm80/tactics.h"

namespace jaxmoe {

const GpuLibrary kSm80 = {"sm80",
                          {80, 86, 89, 90, 100, 103, 120, 121},
                          sm80::kFamily,
                          {{"sm80_w4a16", "sm90_fragment", false}}};

}  // namespace jaxmoe

// Everything is enqueued on the one stream, with sizes that do not depend on the data: XLA may
// record the calls into a CUDA graph.
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxmoe_moe_mlp_sm80_v1, jaxmoe::handle_moe_mlp<jaxmoe::kSm80>,
                              jaxmoe::gpu_moe_mlp_binding(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxmoe_grouped_matmul_sm80_v1,
                              jaxmoe::handle_grouped_matmul<jaxmoe::kSm80>,
                              jaxmoe::gpu_grouped_matmul_binding(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
