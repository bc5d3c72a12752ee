// The XLA FFI handlers of the Hopper library.
#ifndef JAXMOE_CSRC_BINDINGS_SM90_HANDLERS_H_
#define JAXMOE_CSRC_BINDINGS_SM90_HANDLERS_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "sm90/moe_mlp.h"
#include "xla/ffi/api/ffi.h"

XLA_FFI_DECLARE_HANDLER_SYMBOL(jaxmoe_moe_mlp_sm90_v1);
XLA_FFI_DECLARE_HANDLER_SYMBOL(jaxmoe_grouped_matmul_sm90_v1);

namespace jaxmoe {

inline constexpr const char* kSm90W4A16 = "sm90_w4a16";
inline constexpr const char* kSm90W4A8 = "sm90_w4a8";
inline bool is_sm90_variant(std::string_view variant) {
  return variant == kSm90W4A16 || variant == kSm90W4A8;
}
inline constexpr int64_t kSm90Alignment = 256;  // of the kernels' scratch

// Bytes of the workspace output: scratch, and room to align it, since XLA aligns to less.
inline int64_t sm90_workspace_bytes(int64_t scratch) {
  return scratch ? scratch + kSm90Alignment : 0;
}

}  // namespace jaxmoe

#endif  // JAXMOE_CSRC_BINDINGS_SM90_HANDLERS_H_
