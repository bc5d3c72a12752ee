#include "cpu/types.h"

#include <array>

namespace jaxmoe::cpu {
namespace {

constexpr std::array<ActivationInfo, kNumActivations> kActivations = {{
    {"swiglu", true, 3},
    {"swiglu_step", true, 1},
    {"geglu", true, 0},
    {"geglu_tanh", true, 0},
    {"situ", true, 2},
    {"relu2", false, 0},
    {"silu", false, 0},
    {"gelu", false, 0},
    {"gelu_tanh", false, 0},
    {"relu", false, 0},
    {"identity", false, 0},
}};
constexpr std::array<const char*, kNumFormats> kFormats = {"nvfp4", "mxfp4"};
constexpr std::array<const char*, 2> kComputeNames = {"w4a16", "w4a8"};
constexpr std::array<const char*, kNumVariants> kVariants = {
    "cpu_portable",    "cpu_avx2",        "cpu_avx_vnni", "cpu_avx512",
    "cpu_avx512_vnni", "cpu_avx512_bf16", "cpu_amx"};
constexpr std::array<const char*, 4> kTactics = {"", "integer", "stream", "tiles"};

template <class Enum, class Names>
std::optional<Enum> parse(const Names& names, std::string_view name) {
  for (size_t i = 0; i < names.size(); ++i) {
    if (name == names[i]) return static_cast<Enum>(i);
  }
  return std::nullopt;
}

template <class Names>
std::string join(const Names& names) {
  std::string joined;
  for (const char* name : names) {
    if (!joined.empty()) joined += ", ";
    joined += name;
  }
  return joined;
}

std::array<const char*, kNumActivations> activation_name_array() {
  std::array<const char*, kNumActivations> names;
  for (int i = 0; i < kNumActivations; ++i) names[i] = kActivations[i].name;
  return names;
}

}  // namespace

const ActivationInfo& activation_info(Activation activation) {
  return kActivations[static_cast<size_t>(activation)];
}
const char* compute_name(Compute compute) { return kComputeNames[static_cast<size_t>(compute)]; }
const char* format_name(Format format) { return kFormats[static_cast<size_t>(format)]; }
const char* variant_name(Variant variant) { return kVariants[static_cast<size_t>(variant)]; }
const char* tactic_name(Tactic tactic) { return kTactics[static_cast<size_t>(tactic)]; }

std::optional<Activation> parse_activation(std::string_view name) {
  return parse<Activation>(activation_name_array(), name);
}
std::optional<Compute> parse_compute(std::string_view name) {
  return parse<Compute>(kComputeNames, name);
}
std::optional<Format> parse_format(std::string_view name) { return parse<Format>(kFormats, name); }
std::optional<Variant> parse_variant(std::string_view name) {
  return parse<Variant>(kVariants, name);
}
std::optional<Tactic> parse_tactic(std::string_view name) { return parse<Tactic>(kTactics, name); }

std::string activation_names() { return join(activation_name_array()); }
std::string compute_names() { return join(kComputeNames); }
std::string format_names() { return join(kFormats); }
std::string variant_names() { return join(kVariants); }

}  // namespace jaxmoe::cpu
