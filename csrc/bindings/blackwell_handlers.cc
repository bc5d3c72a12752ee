// XLA hands over device buffers, attributes and a stream; here they are checked and become plain
// structs for csrc/blackwell. Nothing is read from the device and nothing waits for it.
#include "bindings/blackwell_handlers.h"

#include <array>
#include <cstdint>
#include <string>
#include <string_view>

#include "bindings/check.h"
#include "bindings/gpu_checks.h"
#include "bindings/ops.h"
#include "blackwell/moe_mlp.h"
#include "cpu/types.h"

namespace jaxmoe {
namespace {

using blackwell::Format;

constexpr auto kBf16 = ffi::DataType::BF16;

// Names are parsed by the CPU library's vocabulary: both list the same things in the same order.
static_assert(static_cast<int>(cpu::Activation::kSwiglu) ==
                  static_cast<int>(cuda::Activation::kSwiglu) &&
              static_cast<int>(cpu::Activation::kIdentity) ==
                  static_cast<int>(cuda::Activation::kIdentity));

const char* format_name(Format format) { return format == Format::kNvfp4 ? "nvfp4" : "mxfp4"; }

void check_names(Check& check, std::string_view variant, std::string_view format,
                 std::string_view tactic) {
  const auto own = variant_format(variant);
  check.require(own.has_value(),
                "variant must be one of " + variant_names() + ", got " + quoted(variant));
  check_format(check, format);
  if (!check.ok()) return;
  check.require(format == format_name(*own), "format must be " + std::string(format_name(*own)) +
                                                 " for " + std::string(variant) + ", got " +
                                                 quoted(format));
  std::string names;
  bool known = tactic.empty();
  for (const blackwell::TacticInfo& info : blackwell::tactics(*own)) {
    known = known || tactic == info.name;
    names += std::string(names.empty() ? "" : ", ") + info.name;
  }
  check.require(known, "tactic must be '' or one of " + names + ", got " + quoted(tactic));
}

// Tensor maps ask for rows of whole 16 bytes, and of 32 where FP4 is spread over bytes.
void check_multiple(Check& check, const char* name, int64_t value, int multiple,
                    std::string_view variant) {
  check.require(value > 0 && value % multiple == 0,
                std::string(name) + " must be a positive multiple of " + text(multiple) + " for " +
                    std::string(variant) + ", got " + text(value));
}

ffi::Error moe_mlp(cudaStream_t stream, const MoeMlpCall& call,
                   const std::array<ffi::AnyBuffer, 2>& input_scales) {
  const std::string op = std::string("moe_mlp (") + kLibrary + ")";
  Check check(op);
  check_names(check, call.variant, call.format, call.tactic);
  check_activation(check, call.activation);
  check_sizes(check, call);
  if (!check.ok()) return check.error();

  blackwell::MlpArgs args{};
  args.format = *variant_format(call.variant);
  args.activation = static_cast<cuda::Activation>(*cpu::parse_activation(call.activation));
  const bool gated = cuda::is_gated(args.activation);
  const int multiple = blackwell::k_multiple(args.format);
  check_multiple(check, "hidden_size", call.hidden_size, multiple, call.variant);
  check_multiple(check, "intermediate_size", call.intermediate_size, multiple, call.variant);
  check_buffers(check, call, {kBf16},
                blackwell::matrix_bytes(args.format, (gated ? 2 : 1) * call.intermediate_size,
                                        call.hidden_size),
                blackwell::matrix_bytes(args.format, call.hidden_size, call.intermediate_size));
  check_optional(check, "gate_up_input_scale", input_scales[0], {1});
  check_optional(check, "down_input_scale", input_scales[1], {1});
  check_experts(check, call.experts(), blackwell::kMaxExperts);
  check_int32(check, "tokens times top_k", call.tokens() * call.top_k());
  check_int32(check, "hidden_size", call.hidden_size);
  check_int32(check, "twice intermediate_size", 2 * call.intermediate_size);
  check.require(call.top_k() > 0, "expert_ids must have at least one choice for each token, got " +
                                      describe(call.expert_ids));
  check_aligned(check, "x", call.x, 16);
  check_aligned(check, "gate_up", call.gate_up, 32);
  check_aligned(check, "down", call.down, 32);
  check_aligned(check, "out", call.out, 16);
  args.shape = {call.tokens(), call.hidden_size, call.intermediate_size, call.experts(),
                call.top_k()};
  if (check.ok()) {
    check_workspace(
        check, call.workspace,
        gpu_workspace_bytes(blackwell::mlp_workspace_bytes(args.format, args.shape, gated)));
  }
  if (!check.ok()) return check.error();
  if (call.out.element_count() == 0) return ffi::Error::Success();

  args.num_params = static_cast<int>(dimension(call.activation_params, 0));
  args.weight_on_input = call.weight_on_input;
  args.x = call.x.untyped_data();
  args.gate_up = data<const uint8_t>(call.gate_up);
  args.gate_up_global = data<const float>(call.gate_up_global);
  args.down = data<const uint8_t>(call.down);
  args.down_global = data<const float>(call.down_global);
  args.gate_up_bias = optional_data(call.gate_up_bias);
  args.down_bias = optional_data(call.down_bias);
  args.params = data<const float>(call.activation_params);
  args.gate_up_input_scale = optional_data(input_scales[0]);
  args.down_input_scale = optional_data(input_scales[1]);
  args.expert_ids = data<const int32_t>(call.expert_ids);
  args.weights = data<const float>(call.weights);
  args.expert_offset = data<const int32_t>(call.expert_offset);
  args.out = call.out.untyped_data();
  return finished(
      op,
      std::string(call.variant) + ", x " + describe(call.x) + ", expert_ids " +
          describe(call.expert_ids) + ", E=" + text(call.experts()) +
          ", I=" + text(call.intermediate_size) + ", tactic " + quoted(call.tactic),
      blackwell::moe_mlp(args, std::string(call.tactic), aligned(call.workspace), stream));
}

ffi::Error grouped_matmul(cudaStream_t stream, const GroupedMatmulCall& call,
                          const std::array<ffi::AnyBuffer, 1>& input_scales) {
  const std::string op = std::string("grouped_matmul (") + kLibrary + ")";
  Check check(op);
  check_names(check, call.variant, call.format, call.tactic);
  check_sizes(check, call);
  check.require(
      call.n % 8 == 0,
      "n must be a multiple of 8 (the kernel writes 16 bytes at a time), got " + text(call.n));
  if (!check.ok()) return check.error();

  blackwell::GroupedArgs args{};
  args.format = *variant_format(call.variant);
  check_multiple(check, "k", call.k, blackwell::k_multiple(args.format), call.variant);
  check_buffers(check, call, {kBf16}, {kBf16},
                blackwell::matrix_bytes(args.format, call.n, call.k));
  check_optional(check, "input_scale", input_scales[0], {1});
  check.require(call.experts() > 0, "w must hold at least one expert, got " + describe(call.w));
  check_experts(check, call.experts(), blackwell::kMaxExperts);
  check_int32(check, "rows of x", call.rows());
  check_int32(check, "n", call.n);
  check_int32(check, "k", call.k);
  check_aligned(check, "x", call.x, 16);
  check_aligned(check, "w", call.w, 32);
  check_aligned(check, "out", call.out, 16);
  args.shape = {call.rows(), call.n, call.k, call.experts(), call.groups()};
  if (check.ok()) {
    check_workspace(
        check, call.workspace,
        gpu_workspace_bytes(blackwell::grouped_workspace_bytes(args.format, args.shape)));
  }
  if (!check.ok()) return check.error();
  if (call.out.element_count() == 0) return ffi::Error::Success();

  args.x = call.x.untyped_data();
  args.w = data<const uint8_t>(call.w);
  args.w_global = data<const float>(call.w_global);
  args.bias = optional_data(call.bias);
  args.input_scale = optional_data(input_scales[0]);
  args.group_sizes = data<const int32_t>(call.group_sizes);
  args.group_offset = data<const int32_t>(call.group_offset);
  args.out = call.out.untyped_data();
  return finished(
      op,
      std::string(call.variant) + ", x " + describe(call.x) + ", group_sizes " +
          describe(call.group_sizes) + ", E=" + text(call.experts()) + ", n=" + text(call.n) +
          ", tactic " + quoted(call.tactic),
      blackwell::grouped_matmul(args, std::string(call.tactic), aligned(call.workspace), stream));
}

// Input scales come after activation_params, and after bias.
constexpr auto handle_moe_mlp = handle_scaled<MoeMlpCall, moe_mlp, 8, 2>;
constexpr auto handle_grouped_matmul = handle_scaled<GroupedMatmulCall, grouped_matmul, 4, 1>;

using Stream = ffi::PlatformStream<cudaStream_t>;
auto bind_moe_mlp() { return moe_mlp_binding<Stream, 2>().Attr<std::string_view>("tactic"); }
auto bind_grouped_matmul() {
  return grouped_matmul_binding<Stream, 1>().Attr<std::string_view>("tactic");
}

}  // namespace
}  // namespace jaxmoe

// Everything is enqueued on the one stream, with sizes that do not depend on the data: XLA may
// record the calls into a CUDA graph.
XLA_FFI_DEFINE_HANDLER_SYMBOL(JAXMOE_MOE_MLP, jaxmoe::handle_moe_mlp, jaxmoe::bind_moe_mlp(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(JAXMOE_GROUPED_MATMUL, jaxmoe::handle_grouped_matmul,
                              jaxmoe::bind_grouped_matmul(),
                              {xla::ffi::Traits::kCmdBufferCompatible});
