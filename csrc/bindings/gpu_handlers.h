// The XLA FFI handlers of the GPU libraries whose kernels are a cuda::Family.
#ifndef JAXMOE_CSRC_BINDINGS_GPU_HANDLERS_H_
#define JAXMOE_CSRC_BINDINGS_GPU_HANDLERS_H_

#include <cuda_runtime_api.h>

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "bindings/gpu_checks.h"
#include "bindings/ops.h"
#include "cuda/tactics.h"
#include "xla/ffi/api/ffi.h"

namespace jaxmoe {

struct GpuVariant {
  const char* name;
  const char* layout;  // of its weights
  bool fp8;            // multiplies e4m3 activations, with MXFP4 weights alone
};

struct GpuLibrary {
  const char* name;
  std::vector<int> sms;
  const cuda::Family& family;
  std::vector<GpuVariant> variants;
};

// Null if the library has no such variant.
const GpuVariant* find_variant(const GpuLibrary& library, std::string_view name);
// "sm90_w4a16, sm90_w4a8"
std::string variant_names(const GpuLibrary& library);

// Static scales of the operands that a variant rounds to e4m3, for a library that binds them: of x
// and of what is between the products. A variant that rounds neither does not look at them.
using InputScales = std::vector<ffi::AnyBuffer>;

ffi::Error moe_mlp(const GpuLibrary& library, cudaStream_t stream, const MoeMlpCall& call,
                   const InputScales& scales = {});
ffi::Error grouped_matmul(const GpuLibrary& library, cudaStream_t stream,
                          const GroupedMatmulCall& call, const InputScales& scales = {});

// The same for one library, as `handle` and `handle_scaled` want them.
template <const GpuLibrary& kLibrary>
ffi::Error moe_mlp_of(cudaStream_t stream, const MoeMlpCall& call,
                      const std::array<ffi::AnyBuffer, 2>& scales) {
  return moe_mlp(kLibrary, stream, call, {scales.begin(), scales.end()});
}
template <const GpuLibrary& kLibrary>
ffi::Error grouped_matmul_of(cudaStream_t stream, const GroupedMatmulCall& call,
                             const std::array<ffi::AnyBuffer, 1>& scales) {
  return grouped_matmul(kLibrary, stream, call, {scales.begin(), scales.end()});
}
template <const GpuLibrary& kLibrary>
ffi::Error unscaled_moe_mlp_of(cudaStream_t stream, const MoeMlpCall& call) {
  return moe_mlp(kLibrary, stream, call);
}
template <const GpuLibrary& kLibrary>
ffi::Error unscaled_grouped_matmul_of(cudaStream_t stream, const GroupedMatmulCall& call) {
  return grouped_matmul(kLibrary, stream, call);
}
// kScaled: the library binds input scales, after activation_params and after bias.
template <const GpuLibrary& kLibrary, bool kScaled>
constexpr auto handle_moe_mlp = [] {
  if constexpr (kScaled) {
    return handle_scaled<MoeMlpCall, moe_mlp_of<kLibrary>, 8, 2>;
  } else {
    return handle<MoeMlpCall, unscaled_moe_mlp_of<kLibrary>>;
  }
}();
template <const GpuLibrary& kLibrary, bool kScaled>
constexpr auto handle_grouped_matmul = [] {
  if constexpr (kScaled) {
    return handle_scaled<GroupedMatmulCall, grouped_matmul_of<kLibrary>, 4, 1>;
  } else {
    return handle<GroupedMatmulCall, unscaled_grouped_matmul_of<kLibrary>>;
  }
}();

template <bool kScaled>
auto gpu_moe_mlp_binding() {
  return moe_mlp_binding < ffi::PlatformStream<cudaStream_t>,
         kScaled ? 2 : 0 > ().template Attr<std::string_view>("tactic");
}
template <bool kScaled>
auto gpu_grouped_matmul_binding() {
  return grouped_matmul_binding < ffi::PlatformStream<cudaStream_t>,
         kScaled ? 1 : 0 > ().template Attr<std::string_view>("tactic");
}

}  // namespace jaxmoe

#endif  // JAXMOE_CSRC_BINDINGS_GPU_HANDLERS_H_
