// What the handlers of every GPU library check and compute alike.
#ifndef JAXMOE_CSRC_BINDINGS_GPU_CHECKS_H_
#define JAXMOE_CSRC_BINDINGS_GPU_CHECKS_H_

#include <cstdint>
#include <limits>
#include <string>

#include "bindings/check.h"
#include "xla/ffi/api/ffi.h"

namespace jaxmoe {

inline constexpr int64_t kScratchAlignment = 256;  // of the kernels' scratch

// Bytes of the workspace output: scratch, and room to align it, since XLA aligns to less.
inline int64_t gpu_workspace_bytes(int64_t scratch) {
  return scratch ? scratch + kScratchAlignment : 0;
}

inline void* aligned(const ffi::AnyBuffer& workspace) {
  const auto address = reinterpret_cast<uintptr_t>(workspace.untyped_data());
  return reinterpret_cast<void*>((address + kScratchAlignment - 1) / kScratchAlignment *
                                 kScratchAlignment);
}

// Kernels index with 32 bits, and step past the end by less than a grid.
inline void check_int32(Check& check, const char* name, int64_t value) {
  constexpr int64_t kMax = std::numeric_limits<int32_t>::max() - (1 << 20);
  check.require(value <= kMax,
                std::string(name) + " must be at most " + text(kMax) + ", got " + text(value));
}

inline void check_experts(Check& check, int64_t experts, int64_t most) {
  check.require(experts <= most, "the weights must be of at most " + text(most) + " experts, got " +
                                     text(experts) + "; split them with expert_offset");
}

inline void check_aligned(Check& check, const char* name, const ffi::AnyBuffer& buffer, int bytes) {
  const auto off = reinterpret_cast<uintptr_t>(buffer.untyped_data()) % bytes;
  check.require(off == 0, std::string(name) + " must start at a multiple of " + text(bytes) +
                              " bytes, got " + text(static_cast<int64_t>(off)) + " past one");
}

// "" is success; anything else names the kernel and what CUDA said.
inline ffi::Error finished(const std::string& op, const std::string& problem,
                           const std::string& failure) {
  if (failure.empty()) return ffi::Error::Success();
  return ffi::Error::Internal(op + ": " + problem + ": " + failure);
}

}  // namespace jaxmoe

#endif  // JAXMOE_CSRC_BINDINGS_GPU_CHECKS_H_
