// The Python module of a GPU library: handler capsules, the manifest that the capability table is
// checked against, and workspace sizes. Importing it calls no CUDA function and needs no GPU.
#ifndef JAXMOE_CSRC_BINDINGS_GPU_MODULE_H_
#define JAXMOE_CSRC_BINDINGS_GPU_MODULE_H_

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>

#include "bindings/gpu_handlers.h"
#include "bindings/module.h"
#include "cuda/moe_mlp.h"

namespace jaxmoe {

inline constexpr int kGpuAbi = 1;

// The format decides the tactics and the workspace only by the width of the activations.
inline cuda::Format any_format(const GpuVariant& variant) {
  return variant.fp8 ? cuda::Format::kMxfp4Fp8 : cuda::Format::kNvfp4;
}

inline nanobind::dict gpu_manifest(const GpuLibrary& library) {
  nanobind::dict variants;
  for (const GpuVariant& variant : library.variants) {
    nanobind::list sms, dtypes, formats;
    for (const int sm : library.sms) sms.append(sm);
    dtypes.append("bfloat16");
    dtypes.append("float16");
    nanobind::dict tactics;
    int smem_bytes = 0;
    for (const cuda::TacticInfo& info : cuda::tactics(library.family, any_format(variant))) {
      tactics[info.name] = info.smem_bytes;
      smem_bytes = std::max(smem_bytes, info.smem_bytes);
    }
    nanobind::dict entry;
    entry["sms"] = sms;
    entry["smem_bytes"] = smem_bytes;
    entry["activation_dtypes"] = dtypes;
    entry["layout"] = variant.layout;
    entry["tactics"] = tactics;
    if (variant.fp8) {
      formats.append("mxfp4");
      entry["formats"] = formats;
    }
    variants[variant.name] = entry;
  }
  return library_manifest(kGpuAbi, library.name, variants);
}

inline cuda::Format check_variant(const GpuLibrary& library, const std::string& name,
                                  const std::string& x_dtype) {
  const GpuVariant* variant = find_variant(library, name);
  if (!variant) {
    throw nanobind::value_error(
        ("variant must be one of " + variant_names(library) + ", got '" + name + "'").c_str());
  }
  if (x_dtype != "bfloat16" && x_dtype != "float16") {
    throw nanobind::value_error(
        ("x_dtype must be 'bfloat16' or 'float16', got '" + x_dtype + "'").c_str());
  }
  return any_format(*variant);
}

inline void define_gpu_module(nanobind::module_& m, const GpuLibrary& library,
                              XLA_FFI_Handler* moe_mlp, XLA_FFI_Handler* grouped_matmul) {
  using namespace nanobind::literals;
  const std::string name = library.name;
  m.def(
      "registrations",
      [=] {
        nanobind::dict targets;
        targets[("jaxmoe_moe_mlp_" + name + "_v1").c_str()] = handler(moe_mlp);
        targets[("jaxmoe_grouped_matmul_" + name + "_v1").c_str()] = handler(grouped_matmul);
        return targets;
      },
      "XLA FFI targets: name -> capsule.");
  m.def(
      "manifest", [&library] { return gpu_manifest(library); },
      "What this library was built with.");
  // `gated` is taken so that every caller states it; the workspace holds activations, which are I
  // wide either way.
  m.def(
      "workspace_bytes",
      [&library](const std::string& op, int64_t tokens, int64_t hidden_size,
                 int64_t intermediate_size, int64_t num_experts, int64_t top_k, bool /*gated*/,
                 const std::string& x_dtype, const std::string& variant) {
        check_op(op, "moe_mlp");
        const cuda::Format format = check_variant(library, variant, x_dtype);
        return gpu_workspace_bytes(cuda::mlp_workspace_bytes(
            format, {at_least_zero("tokens", tokens), at_least_zero("hidden_size", hidden_size),
                     at_least_zero("intermediate_size", intermediate_size),
                     at_least_zero("num_experts", num_experts), at_least_zero("top_k", top_k)}));
      },
      "op"_a, nanobind::kw_only(), "tokens"_a, "hidden_size"_a, "intermediate_size"_a,
      "num_experts"_a, "top_k"_a, "gated"_a, "x_dtype"_a, "variant"_a,
      "Bytes of moe_mlp's workspace output.");
  m.def(
      "workspace_bytes",
      [&library](const std::string& op, int64_t rows, int64_t n, int64_t k, int64_t num_experts,
                 int64_t num_groups, const std::string& x_dtype, const std::string& variant) {
        check_op(op, "grouped_matmul");
        const cuda::Format format = check_variant(library, variant, x_dtype);
        return gpu_workspace_bytes(cuda::grouped_workspace_bytes(
            format,
            {at_least_zero("rows", rows), at_least_zero("n", n), at_least_zero("k", k),
             at_least_zero("num_experts", num_experts), at_least_zero("num_groups", num_groups)}));
      },
      "op"_a, nanobind::kw_only(), "rows"_a, "n"_a, "k"_a, "num_experts"_a, "num_groups"_a,
      "x_dtype"_a, "variant"_a, "Bytes of grouped_matmul's workspace output.");
}

}  // namespace jaxmoe

#endif  // JAXMOE_CSRC_BINDINGS_GPU_MODULE_H_
