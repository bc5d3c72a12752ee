// Python module of a Blackwell library (jaxmoe._sm120, ...): handler capsules, the manifest that
// the capability table is checked against, and workspace sizes. Importing it calls no CUDA function
// and needs no GPU.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>

#include "bindings/blackwell_handlers.h"
#include "bindings/gpu_checks.h"
#include "bindings/module.h"
#include "blackwell/moe_mlp.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using namespace jaxmoe;
using blackwell::Format;

constexpr int kAbi = 1;
constexpr int kSms[] = {JAXMOE_SMS};

nb::dict registrations() {
  nb::dict targets;
  targets[JAXMOE_TEXT(JAXMOE_MOE_MLP)] = handler(&JAXMOE_MOE_MLP);
  targets[JAXMOE_TEXT(JAXMOE_GROUPED_MATMUL)] = handler(&JAXMOE_GROUPED_MATMUL);
  return targets;
}

nb::dict variant(Format format) {
  nb::list sms, dtypes, formats;
  for (const int sm : kSms) sms.append(sm);
  dtypes.append("bfloat16");
  formats.append(format == Format::kNvfp4 ? "nvfp4" : "mxfp4");
  nb::dict tactics;
  int smem_bytes = 0;
  for (const blackwell::TacticInfo& info : blackwell::tactics(format)) {
    tactics[info.name] = info.smem_bytes;
    smem_bytes = std::max(smem_bytes, info.smem_bytes);
  }
  nb::dict result;
  result["sms"] = sms;
  result["smem_bytes"] = smem_bytes;
  result["activation_dtypes"] = dtypes;
  result["formats"] = formats;
  result["layout"] = "block_scaled_128x4";
  result["tactics"] = tactics;
  return result;
}

nb::dict manifest() {
  nb::dict variants;
  for (const char* compute : {"w4a4", "w4a8"}) {
    const std::string name = variant_name(compute);
    variants[name.c_str()] = variant(*variant_format(name));
  }
  return library_manifest(kAbi, kLibrary, variants);
}

Format check_variant(const std::string& variant, const std::string& x_dtype) {
  const auto format = variant_format(variant);
  if (!format) {
    throw nb::value_error(
        ("variant must be one of " + variant_names() + ", got '" + variant + "'").c_str());
  }
  if (x_dtype != "bfloat16") {
    throw nb::value_error(("x_dtype must be 'bfloat16', got '" + x_dtype + "'").c_str());
  }
  return *format;
}

int64_t moe_mlp_workspace(const std::string& op, int64_t tokens, int64_t hidden_size,
                          int64_t intermediate_size, int64_t num_experts, int64_t top_k, bool gated,
                          const std::string& x_dtype, const std::string& variant) {
  check_op(op, "moe_mlp");
  const Format format = check_variant(variant, x_dtype);
  return gpu_workspace_bytes(blackwell::mlp_workspace_bytes(
      format,
      {at_least_zero("tokens", tokens), at_least_zero("hidden_size", hidden_size),
       at_least_zero("intermediate_size", intermediate_size),
       at_least_zero("num_experts", num_experts), at_least_zero("top_k", top_k)},
      gated));
}

int64_t grouped_matmul_workspace(const std::string& op, int64_t rows, int64_t n, int64_t k,
                                 int64_t num_experts, int64_t num_groups,
                                 const std::string& x_dtype, const std::string& variant) {
  check_op(op, "grouped_matmul");
  const Format format = check_variant(variant, x_dtype);
  return gpu_workspace_bytes(blackwell::grouped_workspace_bytes(
      format,
      {at_least_zero("rows", rows), at_least_zero("n", n), at_least_zero("k", k),
       at_least_zero("num_experts", num_experts), at_least_zero("num_groups", num_groups)}));
}

}  // namespace

#define JAXMOE_MODULE(name, variable) NB_MODULE(name, variable)
JAXMOE_MODULE(JAXMOE_JOIN(_, JAXMOE_LIBRARY, ), m) {
  m.doc() = "Blackwell kernels of jaxmoe.";
  m.def("registrations", &registrations, "XLA FFI targets: name -> capsule.");
  m.def("manifest", &manifest, "What this library was built with.");
  m.def("workspace_bytes", &moe_mlp_workspace, "op"_a, nb::kw_only(), "tokens"_a, "hidden_size"_a,
        "intermediate_size"_a, "num_experts"_a, "top_k"_a, "gated"_a, "x_dtype"_a, "variant"_a,
        "Bytes of moe_mlp's workspace output.");
  m.def("workspace_bytes", &grouped_matmul_workspace, "op"_a, nb::kw_only(), "rows"_a, "n"_a, "k"_a,
        "num_experts"_a, "num_groups"_a, "x_dtype"_a, "variant"_a,
        "Bytes of grouped_matmul's workspace output.");
}
