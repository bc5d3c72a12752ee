#include "bindings/ops.h"

#include "cpu/layout.h"

namespace jaxmoe {
namespace {

constexpr auto kF32 = ffi::DataType::F32;
constexpr auto kS32 = ffi::DataType::S32;
constexpr auto kU8 = ffi::DataType::U8;

void check_block_multiple(Check& check, const char* name, int64_t value, std::string_view format) {
  const int block = cpu::block_size(*cpu::parse_format(format));
  check.require(value > 0 && value % block == 0,
                std::string(name) + " must be a positive multiple of " + text(block) +
                    " (the format's block size), got " + text(value));
}

}  // namespace

void check_optional(Check& check, const char* name, const ffi::AnyBuffer& buffer,
                    const std::vector<int64_t>& dims) {
  const bool absent = buffer.dimensions().size() == 1 && buffer.dimensions()[0] == 0;
  check.buffer(name, buffer, {kF32}, absent ? std::vector<int64_t>{0} : dims);
}

void check_format(Check& check, std::string_view format) {
  check.require(cpu::parse_format(format).has_value(),
                "format must be one of " + cpu::format_names() + ", got " + quoted(format));
}

void check_activation(Check& check, std::string_view activation) {
  check.require(
      cpu::parse_activation(activation).has_value(),
      "activation must be one of " + cpu::activation_names() + ", got " + quoted(activation));
}

void check_sizes(Check& check, const MoeMlpCall& call) {
  if (!check.ok()) return;
  check_block_multiple(check, "hidden_size", call.hidden_size, call.format);
  check_block_multiple(check, "intermediate_size", call.intermediate_size, call.format);
}

void check_sizes(Check& check, const GroupedMatmulCall& call) {
  if (!check.ok()) return;
  check.require(call.n > 0, "n must be positive, got " + text(call.n));
  check_block_multiple(check, "k", call.k, call.format);
}

void check_buffers(Check& check, const MoeMlpCall& call,
                   std::initializer_list<ffi::DataType> x_dtypes, int64_t gate_up_bytes,
                   int64_t down_bytes) {
  const cpu::ActivationInfo& info = cpu::activation_info(*cpu::parse_activation(call.activation));
  const int64_t tokens = call.tokens(), hidden = call.hidden_size, experts = call.experts();
  const int64_t rows = info.gated ? 2 * call.intermediate_size : call.intermediate_size;
  check.buffer("x", call.x, x_dtypes, {-1, hidden})
      .buffer("gate_up", call.gate_up, {kU8}, {-1, gate_up_bytes})
      .require(experts > 0, "gate_up must hold at least one expert, got " + describe(call.gate_up))
      .buffer("gate_up_global", call.gate_up_global, {kF32}, {experts})
      .buffer("down", call.down, {kU8}, {experts, down_bytes})
      .buffer("down_global", call.down_global, {kF32}, {experts});
  check_optional(check, "gate_up_bias", call.gate_up_bias, {experts, rows});
  check_optional(check, "down_bias", call.down_bias, {experts, hidden});
  check.buffer("activation_params", call.activation_params, {kF32}, {info.num_params, experts})
      .buffer("expert_ids", call.expert_ids, {kS32}, {tokens, -1})
      .buffer("weights", call.weights, {kF32}, {tokens, call.top_k()})
      .buffer("expert_offset", call.expert_offset, {kS32}, {})
      .buffer("out", call.out, {call.x.element_type()}, {tokens, hidden})
      .buffer("workspace", call.workspace, {kU8}, {-1})
      .require(!call.weight_on_input || call.top_k() == 1,
               "weight_on_input needs top_k == 1, got expert_ids " + describe(call.expert_ids));
}

void check_buffers(Check& check, const GroupedMatmulCall& call,
                   std::initializer_list<ffi::DataType> x_dtypes,
                   std::initializer_list<ffi::DataType> out_dtypes, int64_t w_bytes) {
  const int64_t experts = call.experts();
  check.buffer("x", call.x, x_dtypes, {-1, call.k})
      .buffer("w", call.w, {kU8}, {-1, w_bytes})
      .buffer("w_global", call.w_global, {kF32}, {experts});
  check_optional(check, "bias", call.bias, {experts, call.n});
  check.buffer("group_sizes", call.group_sizes, {kS32}, {-1})
      .buffer("group_offset", call.group_offset, {kS32}, {})
      .buffer("out", call.out, out_dtypes, {call.rows(), call.n})
      .buffer("workspace", call.workspace, {kU8}, {-1});
}

void check_workspace(Check& check, const ffi::AnyBuffer& workspace, int64_t needed) {
  check.require(
      static_cast<int64_t>(workspace.element_count()) >= needed,
      "workspace must have at least " + text(needed) + " bytes, got " + describe(workspace));
}

}  // namespace jaxmoe
