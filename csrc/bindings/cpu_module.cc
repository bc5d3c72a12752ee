// Python module jaxmoe._cpu: handler capsules, the manifest that the capability table is checked
// against, the features of this machine, and workspace sizes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <stdexcept>

#include "bindings/cpu_handlers.h"
#include "bindings/module.h"
#include "cpu/features.h"
#include "cpu/moe_mlp.h"
#include "cpu/pages.h"
#include "cpu/self_test.h"
#include "cpu/types.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace {

using namespace jaxmoe::cpu;
using jaxmoe::at_least_zero;
using jaxmoe::check_op;
using jaxmoe::handler;

constexpr int kAbi = 1;

nb::dict registrations() {
  nb::dict targets;
  targets["jaxmoe_moe_mlp_cpu_v1"] = handler(&jaxmoe_moe_mlp_cpu_v1);
  targets["jaxmoe_grouped_matmul_cpu_v1"] = handler(&jaxmoe_grouped_matmul_cpu_v1);
  return targets;
}

nb::dict manifest() {
  nb::dict variants;
  for (const Variant variant : built_variants()) {
    nb::dict entry;
    entry["features"] = required_features(variant);
    entry["layout"] = "panel32";
    nb::dict tactics, computes;
    for (const Compute compute : kComputes) {
      nb::list names;
      for (const Tactic tactic : named_tactics(*kernels(variant), compute)) {
        tactics[tactic_name(tactic)] = 0;  // bytes of shared memory, as GPU libraries state them
        names.append(tactic_name(tactic));
      }
      computes[compute_name(compute)] = names;
    }
    entry["tactics"] = tactics;
    entry["computes"] = computes;  // which of them each arithmetic has
    variants[variant_name(variant)] = entry;
  }
  return jaxmoe::library_manifest(kAbi, "cpu", variants);
}

Variant built_variant(const std::string& name) {
  const auto variant = parse_variant(name);
  if (!variant)
    throw nb::value_error(
        ("variant must be one of " + variant_names() + ", got '" + name + "'").c_str());
  for (const Variant built : built_variants()) {
    if (built == *variant) return built;
  }
  throw nb::value_error(why_not(*variant).c_str());
}

Dtype dtype_of(const std::string& name) {
  if (name == "float32") return Dtype::kF32;
  if (name == "bfloat16") return Dtype::kBf16;
  throw nb::value_error(("x_dtype must be 'float32' or 'bfloat16', got '" + name + "'").c_str());
}

Compute compute_of(const std::string& name) {
  const auto compute = parse_compute(name);
  if (!compute)
    throw nb::value_error(
        ("compute must be one of " + compute_names() + ", got '" + name + "'").c_str());
  return *compute;
}

// `gated` is taken so that every caller states it; the workspace holds activations, which are I
// wide either way.
int64_t moe_mlp_workspace(const std::string& op, int64_t tokens, int64_t hidden_size,
                          int64_t intermediate_size, int64_t num_experts, int64_t top_k,
                          bool /*gated*/, const std::string& x_dtype, const std::string& variant,
                          const std::string& compute) {
  check_op(op, "moe_mlp");
  const MoeMlpShape shape = {
      at_least_zero("tokens", tokens), at_least_zero("hidden_size", hidden_size),
      at_least_zero("intermediate_size", intermediate_size),
      at_least_zero("num_experts", num_experts), at_least_zero("top_k", top_k)};
  return moe_mlp_workspace_bytes(*kernels(built_variant(variant)), compute_of(compute),
                                 dtype_of(x_dtype), shape);
}

// Every thread's scratch is its own; nothing is shared between phases.
int64_t grouped_matmul_workspace(const std::string& op, int64_t rows, int64_t n, int64_t k,
                                 int64_t num_experts, int64_t num_groups,
                                 const std::string& x_dtype, const std::string& variant,
                                 const std::string& compute) {
  check_op(op, "grouped_matmul");
  at_least_zero("rows", rows);
  at_least_zero("n", n);
  at_least_zero("k", k);
  at_least_zero("num_experts", num_experts);
  at_least_zero("num_groups", num_groups);
  dtype_of(x_dtype);
  built_variant(variant);
  compute_of(compute);
  return 0;
}

std::string run_self_test(const std::string& variant) {
  const Variant built = built_variant(variant);
  const std::string lacking = why_not(built);
  return lacking.empty() ? self_test(*kernels(built)) : lacking;
}

}  // namespace

NB_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of jaxmoe.";
  m.def("registrations", &registrations, "XLA FFI targets: name -> capsule.");
  m.def("manifest", &manifest, "What this library was built with.");
  m.def("cpu_features", &cpu_features, "Usable features of this machine.");
  m.def(
      "use_huge_pages",
      [](uintptr_t address, size_t bytes) {
        return use_huge_pages(reinterpret_cast<void*>(address), bytes);
      },
      "address"_a, "bytes"_a, nb::call_guard<nb::gil_scoped_release>(),
      "Moves memory to huge pages; false where the system does not do that.");
  m.def("self_test", &run_self_test, "variant"_a,
        "Runs a tiny problem; returns '' or what was wrong with the numbers.");
  m.def("workspace_bytes", &moe_mlp_workspace, "op"_a, nb::kw_only(), "tokens"_a, "hidden_size"_a,
        "intermediate_size"_a, "num_experts"_a, "top_k"_a, "gated"_a, "x_dtype"_a, "variant"_a,
        "compute"_a, "Bytes of moe_mlp's workspace output.");
  m.def("workspace_bytes", &grouped_matmul_workspace, "op"_a, nb::kw_only(), "rows"_a, "n"_a, "k"_a,
        "num_experts"_a, "num_groups"_a, "x_dtype"_a, "variant"_a, "compute"_a,
        "Bytes of grouped_matmul's workspace output.");
}
