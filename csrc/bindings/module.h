// What the Python modules of all libraries share.
#ifndef JAXMOE_CSRC_BINDINGS_MODULE_H_
#define JAXMOE_CSRC_BINDINGS_MODULE_H_

#include <nanobind/nanobind.h>

#include <cstdint>
#include <string>

#include "cpu/types.h"
#include "xla/ffi/api/ffi.h"

namespace jaxmoe {

// jax.ffi.register_ffi_target takes capsules of this name.
inline nanobind::capsule handler(XLA_FFI_Handler* function) {
  return nanobind::capsule(reinterpret_cast<void*>(function), "xla._CUSTOM_CALL_TARGET");
}

// The manifest of a library whose variants have every format, activation and operation; a variant
// states what is its own, the layout of its weights among it.
inline nanobind::dict library_manifest(int abi, const char* library, nanobind::dict variants) {
  nanobind::list formats, activations, ops;
  for (int i = 0; i < cpu::kNumFormats; ++i) {
    formats.append(cpu::format_name(static_cast<cpu::Format>(i)));
  }
  for (int i = 0; i < cpu::kNumActivations; ++i) {
    activations.append(cpu::activation_info(static_cast<cpu::Activation>(i)).name);
  }
  ops.append("moe_mlp");
  ops.append("grouped_matmul");
  nanobind::dict result;
  result["abi"] = abi;
  result["library"] = library;
  result["build"] = JAXMOE_BUILD_ID;  // of the kernels' sources and compiler (CMakeLists.txt)
  result["variants"] = variants;
  result["formats"] = formats;
  result["activations"] = activations;
  result["ops"] = ops;
  return result;
}

inline void check_op(const std::string& op, const char* expected) {
  if (op == expected) return;
  throw nanobind::value_error(
      ("op must be '" + std::string(expected) + "' with these arguments, got '" + op + "'")
          .c_str());
}

inline int64_t at_least_zero(const char* name, int64_t value) {
  if (value >= 0) return value;
  throw nanobind::value_error(
      (std::string(name) + " must be >= 0, got " + std::to_string(value)).c_str());
}

}  // namespace jaxmoe

#endif  // JAXMOE_CSRC_BINDINGS_MODULE_H_
