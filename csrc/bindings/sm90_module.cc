// Python module jaxmoe._sm90.
#include "bindings/gpu_module.h"
#include "bindings/sm90_handlers.h"

NB_MODULE(_sm90, m) {
  m.doc() = "Hopper kernels of jaxmoe.";
  jaxmoe::define_gpu_module(m, jaxmoe::kSm90, &jaxmoe_moe_mlp_sm90_v1,
                            &jaxmoe_grouped_matmul_sm90_v1);
}
