// The XLA FFI handlers of the GPU libraries whose kernels are a cuda::Family.
#ifndef JAXMOE_CSRC_BINDINGS_GPU_HANDLERS_H_
#define JAXMOE_CSRC_BINDINGS_GPU_HANDLERS_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

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

inline constexpr int64_t kScratchAlignment = 256;  // of the kernels' scratch
// Bytes of the workspace output: scratch, and room to align it, since XLA aligns to less.
inline int64_t gpu_workspace_bytes(int64_t scratch) {
  return scratch ? scratch + kScratchAlignment : 0;
}

ffi::Error moe_mlp(const GpuLibrary& library, cudaStream_t stream, const MoeMlpCall& call);
ffi::Error grouped_matmul(const GpuLibrary& library, cudaStream_t stream,
                          const GroupedMatmulCall& call);

// The same for one library, as `handle` wants them.
template <const GpuLibrary& kLibrary>
ffi::Error moe_mlp_of(cudaStream_t stream, const MoeMlpCall& call) {
  return moe_mlp(kLibrary, stream, call);
}
template <const GpuLibrary& kLibrary>
ffi::Error grouped_matmul_of(cudaStream_t stream, const GroupedMatmulCall& call) {
  return grouped_matmul(kLibrary, stream, call);
}
template <const GpuLibrary& kLibrary>
constexpr auto handle_moe_mlp = handle<MoeMlpCall, moe_mlp_of<kLibrary>>;
template <const GpuLibrary& kLibrary>
constexpr auto handle_grouped_matmul = handle<GroupedMatmulCall, grouped_matmul_of<kLibrary>>;

inline auto gpu_moe_mlp_binding() {
  return moe_mlp_binding<ffi::PlatformStream<cudaStream_t>>().Attr<std::string_view>("tactic");
}
inline auto gpu_grouped_matmul_binding() {
  return grouped_matmul_binding<ffi::PlatformStream<cudaStream_t>>().Attr<std::string_view>(
      "tactic");
}

}  // namespace jaxmoe

#endif  // JAXMOE_CSRC_BINDINGS_GPU_HANDLERS_H_
