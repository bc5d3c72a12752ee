// The XLA FFI handlers of a Blackwell library. JAXMOE_LIBRARY names it (sm120, sm100_emulated,
// ...), and its targets and variants have that name in theirs.
#ifndef JAXMOE_CSRC_BINDINGS_BLACKWELL_HANDLERS_H_
#define JAXMOE_CSRC_BINDINGS_BLACKWELL_HANDLERS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "blackwell/layout.h"
#include "xla/ffi/api/ffi.h"

#define JAXMOE_JOIN_(a, b, c) a##b##c
#define JAXMOE_JOIN(a, b, c) JAXMOE_JOIN_(a, b, c)
#define JAXMOE_TEXT_(a) #a
#define JAXMOE_TEXT(a) JAXMOE_TEXT_(a)
#define JAXMOE_MOE_MLP JAXMOE_JOIN(jaxmoe_moe_mlp_, JAXMOE_LIBRARY, _v1)
#define JAXMOE_GROUPED_MATMUL JAXMOE_JOIN(jaxmoe_grouped_matmul_, JAXMOE_LIBRARY, _v1)

XLA_FFI_DECLARE_HANDLER_SYMBOL(JAXMOE_MOE_MLP);
XLA_FFI_DECLARE_HANDLER_SYMBOL(JAXMOE_GROUPED_MATMUL);

namespace jaxmoe {

inline constexpr const char* kLibrary = JAXMOE_TEXT(JAXMOE_LIBRARY);

// "sm120_w4a4", "sm120_w4a4_emulated"
inline std::string variant_name(const char* compute) {
  const std::string library = kLibrary;
  return library.substr(0, 5) + "_" + compute + library.substr(5);
}
// The format of a variant of this library, which is the variant's only one.
inline std::optional<blackwell::Format> variant_format(std::string_view variant) {
  if (variant == variant_name("w4a4")) return blackwell::Format::kNvfp4;
  if (variant == variant_name("w4a8")) return blackwell::Format::kMxfp4;
  return std::nullopt;
}
inline std::string variant_names() { return variant_name("w4a4") + ", " + variant_name("w4a8"); }

}  // namespace jaxmoe

#endif  // JAXMOE_CSRC_BINDINGS_BLACKWELL_HANDLERS_H_
