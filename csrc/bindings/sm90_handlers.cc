#include "bindings/sm90_handlers.h"

#include "sm90/tactics.h"

namespace jaxmoe {

const GpuLibrary kSm90 = {
    "sm90",
    {90},
    sm90::kFamily,
    {{"sm90_w4a16", "sm90_fragment", false}, {"sm90_w4a8", "sm90_fragment_fp8", true}}};

}  // namespace jaxmoe

// Everything is enqueued on the one stream, with sizes that do not depend on the data: XLA may
// record the calls into a CUDA graph.
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxmoe_moe_mlp_sm90_v1, jaxmoe::handle_moe_mlp<jaxmoe::kSm90>,
                              jaxmoe::gpu_moe_mlp_binding(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxmoe_grouped_matmul_sm90_v1,
                              jaxmoe::handle_grouped_matmul<jaxmoe::kSm90>,
                              jaxmoe::gpu_grouped_matmul_binding(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
