// Python module jaxmoe._sm80.
#include "bindings/gpu_module.h"
#include "bindings/sm80_handlers.h"

NB_MODULE(_sm80, m) {
  m.doc() = "mma.sync kernels of jaxmoe.";
  jaxmoe::define_gpu_module(m, jaxmoe::kSm80, &jaxmoe_moe_mlp_sm80_v1,
                            &jaxmoe_grouped_matmul_sm80_v1);
}
