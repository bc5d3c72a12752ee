// XLA hands over buffers and attributes; here they are checked and become plain structs for
// csrc/cpu.
#include "bindings/cpu_handlers.h"

#include <functional>
#include <string>
#include <string_view>
#include <utility>

#include "bindings/check.h"
#include "bindings/ops.h"
#include "cpu/features.h"
#include "cpu/grouped_matmul.h"
#include "cpu/moe_mlp.h"

namespace jaxmoe {
namespace {

using cpu::Dtype;
using cpu::Variant;

constexpr auto kF32 = ffi::DataType::F32;
constexpr auto kBf16 = ffi::DataType::BF16;

class XlaExecutor : public cpu::Executor {
 public:
  explicit XlaExecutor(ffi::ThreadPool& pool) : pool_(pool) {}
  int num_threads() const override { return static_cast<int>(pool_.num_threads()); }
  void schedule(std::function<void()> task) override { pool_.Schedule(std::move(task)); }

 private:
  ffi::ThreadPool& pool_;
};

Dtype dtype_of(const ffi::AnyBuffer& buffer) {
  return buffer.element_type() == kBf16 ? Dtype::kBf16 : Dtype::kF32;
}

template <class Call>
void check_names(Check& check, const Call& call) {
  const auto parsed = cpu::parse_variant(call.variant);
  check.require(parsed.has_value(),
                "variant must be one of " + cpu::variant_names() + ", got " + quoted(call.variant));
  if (check.ok()) {
    const std::string reason = cpu::why_not(*parsed);
    check.require(reason.empty(), reason);
  }
  check_format(check, call.format);
  check.require(cpu::parse_compute(call.compute).has_value(),
                "compute must be one of " + cpu::compute_names() + ", got " + quoted(call.compute));
}

// cpu_avx512_bf16 exists for bf16 activations: with f32 ones it would be cpu_avx512_vnni, more
// slowly.
void check_dtype(Check& check, Variant variant, const ffi::AnyBuffer& x) {
  check.require(variant != Variant::kAvx512Bf16 || x.element_type() == kBf16,
                "x must be bf16 for variant 'cpu_avx512_bf16', got " + describe(x) +
                    "; use 'cpu_avx512_vnni' for f32 activations");
}

// The tactic of this name that the variant has for `compute`; `out` is where results go.
cpu::Tactic check_tactic(Check& check, std::string_view name, Variant variant, cpu::Compute compute,
                         const ffi::AnyBuffer& x, const ffi::AnyBuffer& out) {
  const auto parsed = cpu::parse_tactic(name);
  std::string names;
  bool known = name.empty();
  for (const cpu::Tactic tactic : cpu::named_tactics(*cpu::kernels(variant), compute)) {
    known = known || parsed == tactic;
    names += std::string(names.empty() ? "" : ", ") + cpu::tactic_name(tactic);
  }
  check.require(known, "tactic must be '' or one of " + names + " for compute='" +
                           cpu::compute_name(compute) + "', got " + quoted(name));
  if (!known) return cpu::Tactic::kAuto;
  const bool bf16 = x.element_type() == kBf16 && out.element_type() == kBf16;
  check.require(parsed != cpu::Tactic::kInteger || compute == cpu::Compute::kW4a8 || bf16,
                "tactic 'integer' keeps 16 bits of x and needs bf16 x and results, got x " +
                    describe(x) + " and results " + describe(out) +
                    "; use '', 'stream' or 'tiles' for f32");
  return *parsed;
}

ffi::Error moe_mlp(ffi::ThreadPool pool, const MoeMlpCall& call) {
  Check check("moe_mlp (cpu)");
  check_names(check, call);
  check_activation(check, call.activation);
  check_sizes(check, call);
  if (!check.ok()) return check.error();

  cpu::MoeMlpArgs args;
  const Variant chosen = *cpu::parse_variant(call.variant);
  args.kernels = cpu::kernels(chosen);
  args.format = *cpu::parse_format(call.format);
  args.compute = *cpu::parse_compute(call.compute);
  args.activation = *cpu::parse_activation(call.activation);
  args.weight_on_input = call.weight_on_input;
  args.shape = {call.tokens(), call.hidden_size, call.intermediate_size, call.experts(),
                call.top_k()};
  check_buffers(check, call, {kF32, kBf16},
                cpu::gate_up_bytes(args.format, args.activation, args.shape),
                cpu::down_bytes(args.format, args.shape));
  check_dtype(check, chosen, call.x);
  args.tactic = check_tactic(check, call.tactic, chosen, args.compute, call.x, call.out);
  if (!check.ok()) return check.error();

  args.dtype = dtype_of(call.x);
  check_workspace(
      check, call.workspace,
      cpu::moe_mlp_workspace_bytes(*args.kernels, args.compute, args.dtype, args.shape));
  if (!check.ok()) return check.error();

  args.expert_offset = *data<const int32_t>(call.expert_offset);
  args.x = call.x.untyped_data();
  args.gate_up = data<const uint8_t>(call.gate_up);
  args.gate_up_global = data<const float>(call.gate_up_global);
  args.down = data<const uint8_t>(call.down);
  args.down_global = data<const float>(call.down_global);
  args.gate_up_bias = optional_data(call.gate_up_bias);
  args.down_bias = optional_data(call.down_bias);
  args.activation_params = data<const float>(call.activation_params);
  args.expert_ids = data<const int32_t>(call.expert_ids);
  args.weights = data<const float>(call.weights);
  args.out = call.out.untyped_data();
  args.workspace = call.workspace.untyped_data();
  XlaExecutor executor(pool);
  if (cpu::moe_mlp(args, &executor)) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                    "moe_mlp (cpu): out of memory for thread scratch");
}

ffi::Error grouped_matmul(ffi::ThreadPool pool, const GroupedMatmulCall& call) {
  Check check("grouped_matmul (cpu)");
  check_names(check, call);
  check_sizes(check, call);
  if (!check.ok()) return check.error();

  cpu::GroupedMatmulArgs args;
  const Variant chosen = *cpu::parse_variant(call.variant);
  args.kernels = cpu::kernels(chosen);
  args.format = *cpu::parse_format(call.format);
  args.compute = *cpu::parse_compute(call.compute);
  check_buffers(check, call, {kF32, kBf16}, {kF32, kBf16},
                cpu::grouped_matmul_bytes(args.format, call.n, call.k));
  check_dtype(check, chosen, call.x);
  args.tactic = check_tactic(check, call.tactic, chosen, args.compute, call.x, call.out);
  if (!check.ok()) return check.error();

  args.rows = call.rows();
  args.n = call.n;
  args.k = call.k;
  args.num_experts = call.experts();
  args.num_groups = call.groups();
  args.x_dtype = dtype_of(call.x);
  args.out_dtype = dtype_of(call.out);
  args.group_offset = *data<const int32_t>(call.group_offset);
  args.x = call.x.untyped_data();
  args.w = data<const uint8_t>(call.w);
  args.w_global = data<const float>(call.w_global);
  args.bias = optional_data(call.bias);
  args.group_sizes = data<const int32_t>(call.group_sizes);
  args.out = call.out.untyped_data();
  XlaExecutor executor(pool);
  if (cpu::grouped_matmul(args, &executor)) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                    "grouped_matmul (cpu): out of memory for thread scratch");
}

constexpr auto handle_moe_mlp = handle<MoeMlpCall, moe_mlp>;
constexpr auto handle_grouped_matmul = handle<GroupedMatmulCall, grouped_matmul>;

}  // namespace
}  // namespace jaxmoe

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxmoe_moe_mlp_cpu_v1, jaxmoe::handle_moe_mlp,
                              jaxmoe::moe_mlp_binding<xla::ffi::ThreadPool>()
                                  .Attr<std::string_view>("tactic")
                                  .Attr<std::string_view>("compute"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxmoe_grouped_matmul_cpu_v1, jaxmoe::handle_grouped_matmul,
                              jaxmoe::grouped_matmul_binding<xla::ffi::ThreadPool>()
                                  .Attr<std::string_view>("tactic")
                                  .Attr<std::string_view>("compute"));
