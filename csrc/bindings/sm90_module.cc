// Python module jaxmoe._sm90: handler capsules, the manifest that the capability table is checked
// against, and workspace sizes. Importing it calls no CUDA function and needs no GPU.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>

#include "bindings/module.h"
#include "bindings/sm90_handlers.h"
#include "sm90/moe_mlp.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using namespace jaxmoe;

constexpr int kAbi = 1;

nb::dict registrations() {
  nb::dict targets;
  targets["jaxmoe_moe_mlp_sm90_v1"] = handler(&jaxmoe_moe_mlp_sm90_v1);
  targets["jaxmoe_grouped_matmul_sm90_v1"] = handler(&jaxmoe_grouped_matmul_sm90_v1);
  return targets;
}

nb::dict variant(const char* layout, sm90::Format format) {
  nb::list sms, dtypes;
  sms.append(90);
  dtypes.append("bfloat16");
  dtypes.append("float16");
  nb::dict tactics;
  int smem_bytes = 0;
  for (const sm90::TacticInfo& info : sm90::tactics(format)) {
    tactics[info.name] = info.smem_bytes;
    smem_bytes = std::max(smem_bytes, info.smem_bytes);
  }
  nb::dict result;
  result["sms"] = sms;
  result["smem_bytes"] = smem_bytes;
  result["activation_dtypes"] = dtypes;
  result["layout"] = layout;
  result["tactics"] = tactics;
  return result;
}

nb::dict manifest() {
  nb::list mxfp4;
  mxfp4.append("mxfp4");
  nb::dict w4a8 = variant("sm90_fragment_fp8", sm90::Format::kMxfp4Fp8);
  w4a8["formats"] = mxfp4;
  nb::dict variants;
  variants[kSm90W4A16] = variant("sm90_fragment", sm90::Format::kNvfp4);
  variants[kSm90W4A8] = w4a8;
  return library_manifest(kAbi, "sm90", variants);
}

// The format decides the workspace only by the width of the activations.
sm90::Format check_variant(const std::string& variant, const std::string& x_dtype) {
  if (!is_sm90_variant(variant)) {
    throw nb::value_error(("variant must be one of " + std::string(kSm90W4A16) + ", " +
                           std::string(kSm90W4A8) + ", got '" + variant + "'")
                              .c_str());
  }
  if (x_dtype != "bfloat16" && x_dtype != "float16") {
    throw nb::value_error(
        ("x_dtype must be 'bfloat16' or 'float16', got '" + x_dtype + "'").c_str());
  }
  return variant == kSm90W4A8 ? sm90::Format::kMxfp4Fp8 : sm90::Format::kNvfp4;
}

// `gated` is taken so that every caller states it; the workspace holds activations, which are I
// wide either way.
int64_t moe_mlp_workspace(const std::string& op, int64_t tokens, int64_t hidden_size,
                          int64_t intermediate_size, int64_t num_experts, int64_t top_k,
                          bool /*gated*/, const std::string& x_dtype, const std::string& variant) {
  check_op(op, "moe_mlp");
  const sm90::Format format = check_variant(variant, x_dtype);
  return sm90_workspace_bytes(sm90::mlp_workspace_bytes(
      format, {at_least_zero("tokens", tokens), at_least_zero("hidden_size", hidden_size),
               at_least_zero("intermediate_size", intermediate_size),
               at_least_zero("num_experts", num_experts), at_least_zero("top_k", top_k)}));
}

int64_t grouped_matmul_workspace(const std::string& op, int64_t rows, int64_t n, int64_t k,
                                 int64_t num_experts, int64_t num_groups,
                                 const std::string& x_dtype, const std::string& variant) {
  check_op(op, "grouped_matmul");
  const sm90::Format format = check_variant(variant, x_dtype);
  return sm90_workspace_bytes(sm90::grouped_workspace_bytes(
      format,
      {at_least_zero("rows", rows), at_least_zero("n", n), at_least_zero("k", k),
       at_least_zero("num_experts", num_experts), at_least_zero("num_groups", num_groups)}));
}

}  // namespace

NB_MODULE(_sm90, m) {
  m.doc() = "Hopper kernels of jaxmoe.";
  m.def("registrations", &registrations, "XLA FFI targets: name -> capsule.");
  m.def("manifest", &manifest, "What this library was built with.");
  m.def("workspace_bytes", &moe_mlp_workspace, "op"_a, nb::kw_only(), "tokens"_a, "hidden_size"_a,
        "intermediate_size"_a, "num_experts"_a, "top_k"_a, "gated"_a, "x_dtype"_a, "variant"_a,
        "Bytes of moe_mlp's workspace output.");
  m.def("workspace_bytes", &grouped_matmul_workspace, "op"_a, nb::kw_only(), "rows"_a, "n"_a, "k"_a,
        "num_experts"_a, "num_groups"_a, "x_dtype"_a, "variant"_a,
        "Bytes of grouped_matmul's workspace output.");
}
