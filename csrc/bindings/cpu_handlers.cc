// XLA hands over buffers and attributes; here they are checked and become plain structs for
// csrc/cpu.
#include "bindings/cpu_handlers.h"

#include <functional>
#include <string>
#include <string_view>
#include <utility>

#include "bindings/check.h"
#include "cpu/features.h"
#include "cpu/grouped_matmul.h"
#include "cpu/layout.h"
#include "cpu/moe_mlp.h"

namespace jaxmoe {
namespace {

using cpu::Dtype;
using cpu::Variant;

constexpr auto kF32 = ffi::DataType::F32;
constexpr auto kBf16 = ffi::DataType::BF16;
constexpr auto kS32 = ffi::DataType::S32;
constexpr auto kU8 = ffi::DataType::U8;

class XlaExecutor : public cpu::Executor {
 public:
  explicit XlaExecutor(ffi::ThreadPool& pool) : pool_(pool) {}
  int num_threads() const override { return static_cast<int>(pool_.num_threads()); }
  void schedule(std::function<void()> task) override { pool_.Schedule(std::move(task)); }

 private:
  ffi::ThreadPool& pool_;
};

std::string text(int64_t value) { return std::to_string(value); }
std::string quoted(std::string_view value) { return "'" + std::string(value) + "'"; }

Dtype dtype_of(const ffi::AnyBuffer& buffer) {
  return buffer.element_type() == kBf16 ? Dtype::kBf16 : Dtype::kF32;
}

template <class T>
T* data(const ffi::AnyBuffer& buffer) {
  return static_cast<T*>(buffer.untyped_data());
}
// Null for an absent operand, which is f32[0].
const float* optional_data(const ffi::AnyBuffer& buffer) {
  return buffer.element_count() ? data<const float>(buffer) : nullptr;
}
int64_t dimension(const ffi::AnyBuffer& buffer, size_t axis) {
  return axis < buffer.dimensions().size() ? buffer.dimensions()[axis] : 0;
}

void check_optional(Check& check, const char* name, const ffi::AnyBuffer& buffer,
                    const std::vector<int64_t>& dims) {
  const bool absent = buffer.dimensions().size() == 1 && buffer.dimensions()[0] == 0;
  check.buffer(name, buffer, {kF32}, absent ? std::vector<int64_t>{0} : dims);
}

void check_names(Check& check, std::string_view variant, std::string_view format) {
  const auto parsed = cpu::parse_variant(variant);
  check.require(parsed.has_value(),
                "variant must be one of " + cpu::variant_names() + ", got " + quoted(variant));
  if (check.ok()) {
    const std::string reason = cpu::why_not(*parsed);
    check.require(reason.empty(), reason);
  }
  check.require(cpu::parse_format(format).has_value(),
                "format must be one of " + cpu::format_names() + ", got " + quoted(format));
}

// cpu_avx512_bf16 exists for bf16 activations: with f32 ones it would be cpu_avx512, more slowly.
void check_dtype(Check& check, Variant variant, const ffi::AnyBuffer& x) {
  check.require(variant != Variant::kAvx512Bf16 || x.element_type() == kBf16,
                "x must be bf16 for variant 'cpu_avx512_bf16', got " + describe(x) +
                    "; use 'cpu_avx512' for f32 activations");
}

void check_positive_multiple(Check& check, const char* name, int64_t value, int64_t multiple) {
  check.require(value > 0 && value % multiple == 0,
                std::string(name) + " must be a positive multiple of " + text(multiple) +
                    " (the format's block size), got " + text(value));
}

ffi::Error moe_mlp(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer gate_up,
                   ffi::AnyBuffer gate_up_global, ffi::AnyBuffer down, ffi::AnyBuffer down_global,
                   ffi::AnyBuffer gate_up_bias, ffi::AnyBuffer down_bias,
                   ffi::AnyBuffer activation_params, ffi::AnyBuffer expert_ids,
                   ffi::AnyBuffer weights, ffi::AnyBuffer expert_offset,
                   ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> workspace,
                   std::string_view variant, std::string_view format, std::string_view activation,
                   int64_t hidden_size, int64_t intermediate_size, bool weight_on_input) {
  Check check("moe_mlp (cpu)");
  check_names(check, variant, format);
  check.require(
      cpu::parse_activation(activation).has_value(),
      "activation must be one of " + cpu::activation_names() + ", got " + quoted(activation));
  if (!check.ok()) return check.error();

  cpu::MoeMlpArgs args;
  const Variant chosen = *cpu::parse_variant(variant);
  args.kernels = cpu::kernels(chosen);
  args.format = *cpu::parse_format(format);
  args.activation = *cpu::parse_activation(activation);
  args.weight_on_input = weight_on_input;
  const cpu::ActivationInfo& info = cpu::activation_info(args.activation);
  const int block = cpu::block_size(args.format);
  check_positive_multiple(check, "hidden_size", hidden_size, block);
  check_positive_multiple(check, "intermediate_size", intermediate_size, block);
  if (!check.ok()) return check.error();

  args.shape = {dimension(x, 0), hidden_size, intermediate_size, dimension(gate_up, 0),
                dimension(expert_ids, 1)};
  const auto& [tokens, hidden, intermediate, experts, top_k] = args.shape;
  check.buffer("x", x, {kF32, kBf16}, {-1, hidden})
      .buffer("gate_up", gate_up, {kU8},
              {-1, cpu::gate_up_bytes(args.format, args.activation, args.shape)})
      .require(experts > 0, "gate_up must hold at least one expert, got " + describe(gate_up))
      .buffer("gate_up_global", gate_up_global, {kF32}, {experts})
      .buffer("down", down, {kU8}, {experts, cpu::down_bytes(args.format, args.shape)})
      .buffer("down_global", down_global, {kF32}, {experts});
  check_optional(check, "gate_up_bias", gate_up_bias,
                 {experts, info.gated ? 2 * intermediate : intermediate});
  check_optional(check, "down_bias", down_bias, {experts, hidden});
  check.buffer("activation_params", activation_params, {kF32}, {info.num_params, experts})
      .buffer("expert_ids", expert_ids, {kS32}, {tokens, -1})
      .buffer("weights", weights, {kF32}, {tokens, top_k})
      .buffer("expert_offset", expert_offset, {kS32}, {})
      .buffer("out", *out, {x.element_type()}, {tokens, hidden})
      .buffer("workspace", *workspace, {kU8}, {-1})
      .require(!weight_on_input || top_k == 1,
               "weight_on_input needs top_k == 1, got expert_ids " + describe(expert_ids));
  check_dtype(check, chosen, x);
  if (!check.ok()) return check.error();

  args.dtype = dtype_of(x);
  const int64_t needed = cpu::moe_mlp_workspace_bytes(*args.kernels, args.dtype, args.shape);
  check.require(
      static_cast<int64_t>(workspace->element_count()) >= needed,
      "workspace must have at least " + text(needed) + " bytes, got " + describe(*workspace));
  if (!check.ok()) return check.error();

  args.expert_offset = *data<const int32_t>(expert_offset);
  args.x = x.untyped_data();
  args.gate_up = data<const uint8_t>(gate_up);
  args.gate_up_global = data<const float>(gate_up_global);
  args.down = data<const uint8_t>(down);
  args.down_global = data<const float>(down_global);
  args.gate_up_bias = optional_data(gate_up_bias);
  args.down_bias = optional_data(down_bias);
  args.activation_params = data<const float>(activation_params);
  args.expert_ids = data<const int32_t>(expert_ids);
  args.weights = data<const float>(weights);
  args.out = out->untyped_data();
  args.workspace = workspace->untyped_data();
  XlaExecutor executor(pool);
  if (cpu::moe_mlp(args, &executor)) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                    "moe_mlp (cpu): out of memory for thread scratch");
}

ffi::Error grouped_matmul(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w,
                          ffi::AnyBuffer w_global, ffi::AnyBuffer bias, ffi::AnyBuffer group_sizes,
                          ffi::AnyBuffer group_offset, ffi::Result<ffi::AnyBuffer> out,
                          ffi::Result<ffi::AnyBuffer> workspace, std::string_view variant,
                          std::string_view format, int64_t n, int64_t k) {
  Check check("grouped_matmul (cpu)");
  check_names(check, variant, format);
  if (!check.ok()) return check.error();

  cpu::GroupedMatmulArgs args;
  const Variant chosen = *cpu::parse_variant(variant);
  args.kernels = cpu::kernels(chosen);
  args.format = *cpu::parse_format(format);
  check.require(n > 0, "n must be positive, got " + text(n));
  check_positive_multiple(check, "k", k, cpu::block_size(args.format));
  if (!check.ok()) return check.error();

  args.rows = dimension(x, 0);
  args.n = n;
  args.k = k;
  args.num_experts = dimension(w, 0);
  args.num_groups = dimension(group_sizes, 0);
  check.buffer("x", x, {kF32, kBf16}, {-1, k})
      .buffer("w", w, {kU8}, {-1, cpu::grouped_matmul_bytes(args.format, n, k)})
      .buffer("w_global", w_global, {kF32}, {args.num_experts});
  check_optional(check, "bias", bias, {args.num_experts, n});
  check.buffer("group_sizes", group_sizes, {kS32}, {-1})
      .buffer("group_offset", group_offset, {kS32}, {})
      .buffer("out", *out, {kF32, kBf16}, {args.rows, n})
      .buffer("workspace", *workspace, {kU8}, {-1});
  check_dtype(check, chosen, x);
  if (!check.ok()) return check.error();

  args.x_dtype = dtype_of(x);
  args.out_dtype = dtype_of(*out);
  args.group_offset = *data<const int32_t>(group_offset);
  args.x = x.untyped_data();
  args.w = data<const uint8_t>(w);
  args.w_global = data<const float>(w_global);
  args.bias = optional_data(bias);
  args.group_sizes = data<const int32_t>(group_sizes);
  args.out = out->untyped_data();
  XlaExecutor executor(pool);
  if (cpu::grouped_matmul(args, &executor)) return ffi::Error::Success();
  return ffi::Error(ffi::ErrorCode::kResourceExhausted,
                    "grouped_matmul (cpu): out of memory for thread scratch");
}

}  // namespace
}  // namespace jaxmoe

namespace ffi = xla::ffi;

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxmoe_moe_mlp_cpu_v1, jaxmoe::moe_mlp,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // x
                                  .Arg<ffi::AnyBuffer>()  // gate_up
                                  .Arg<ffi::AnyBuffer>()  // gate_up_global
                                  .Arg<ffi::AnyBuffer>()  // down
                                  .Arg<ffi::AnyBuffer>()  // down_global
                                  .Arg<ffi::AnyBuffer>()  // gate_up_bias
                                  .Arg<ffi::AnyBuffer>()  // down_bias
                                  .Arg<ffi::AnyBuffer>()  // activation_params
                                  .Arg<ffi::AnyBuffer>()  // expert_ids
                                  .Arg<ffi::AnyBuffer>()  // weights
                                  .Arg<ffi::AnyBuffer>()  // expert_offset
                                  .Ret<ffi::AnyBuffer>()  // out
                                  .Ret<ffi::AnyBuffer>()  // workspace
                                  .Attr<std::string_view>("variant")
                                  .Attr<std::string_view>("format")
                                  .Attr<std::string_view>("activation")
                                  .Attr<int64_t>("hidden_size")
                                  .Attr<int64_t>("intermediate_size")
                                  .Attr<bool>("weight_on_input"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(jaxmoe_grouped_matmul_cpu_v1, jaxmoe::grouped_matmul,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()  // x
                                  .Arg<ffi::AnyBuffer>()  // w
                                  .Arg<ffi::AnyBuffer>()  // w_global
                                  .Arg<ffi::AnyBuffer>()  // bias
                                  .Arg<ffi::AnyBuffer>()  // group_sizes
                                  .Arg<ffi::AnyBuffer>()  // group_offset
                                  .Ret<ffi::AnyBuffer>()  // out
                                  .Ret<ffi::AnyBuffer>()  // workspace
                                  .Attr<std::string_view>("variant")
                                  .Attr<std::string_view>("format")
                                  .Attr<int64_t>("n")
                                  .Attr<int64_t>("k"));
