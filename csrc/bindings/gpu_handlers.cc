// XLA hands over device buffers, attributes and a stream; here they are checked and become plain
// structs for csrc/cuda. Nothing is read from the device and nothing waits for it.
#include "bindings/gpu_handlers.h"

#include "bindings/check.h"
#include "bindings/gpu_checks.h"
#include "cpu/types.h"

namespace jaxmoe {
namespace {

constexpr auto kBf16 = ffi::DataType::BF16;
constexpr auto kF16 = ffi::DataType::F16;

// Names are parsed by the CPU library's vocabulary: both list the same things in the same order.
#define JAXMOE_SAME(name) \
  static_assert(static_cast<int>(cpu::Activation::name) == static_cast<int>(cuda::Activation::name))
JAXMOE_SAME(kSwiglu);
JAXMOE_SAME(kSwigluStep);
JAXMOE_SAME(kGeglu);
JAXMOE_SAME(kGegluTanh);
JAXMOE_SAME(kSitu);
JAXMOE_SAME(kRelu2);
JAXMOE_SAME(kSilu);
JAXMOE_SAME(kGelu);
JAXMOE_SAME(kGeluTanh);
JAXMOE_SAME(kRelu);
JAXMOE_SAME(kIdentity);
#undef JAXMOE_SAME
static_assert(static_cast<int>(cpu::Format::kNvfp4) == static_cast<int>(cuda::Format::kNvfp4) &&
              static_cast<int>(cpu::Format::kMxfp4) == static_cast<int>(cuda::Format::kMxfp4));

cuda::Format format_of(const GpuVariant& variant, std::string_view format) {
  if (variant.fp8) return cuda::Format::kMxfp4Fp8;
  return static_cast<cuda::Format>(*cpu::parse_format(format));
}
cuda::Dtype dtype_of(const ffi::AnyBuffer& buffer) {
  return buffer.element_type() == kF16 ? cuda::Dtype::kFp16 : cuda::Dtype::kBf16;
}

// The variant and the tactic are the library's, and the format is the variant's.
void check_names(Check& check, const GpuLibrary& library, std::string_view name,
                 std::string_view format, std::string_view tactic) {
  const GpuVariant* variant = find_variant(library, name);
  check.require(variant,
                "variant must be one of " + variant_names(library) + ", got " + quoted(name));
  check_format(check, format);
  check.require(!variant || !variant->fp8 || format == "mxfp4",
                "format must be mxfp4 for " + std::string(name) + ", got " + quoted(format));
  if (!check.ok()) return;
  std::string names;
  bool known = tactic.empty();
  for (const cuda::TacticInfo& info : cuda::tactics(library.family, format_of(*variant, format))) {
    known = known || tactic == info.name;
    names += std::string(names.empty() ? "" : ", ") + info.name;
  }
  check.require(known, "tactic must be '' or one of " + names + ", got " + quoted(tactic));
}

constexpr int kRowBytes = 16;  // rows are copied so many at a time

}  // namespace

const GpuVariant* find_variant(const GpuLibrary& library, std::string_view name) {
  for (const GpuVariant& variant : library.variants) {
    if (name == variant.name) return &variant;
  }
  return nullptr;
}

std::string variant_names(const GpuLibrary& library) {
  std::string names;
  for (const GpuVariant& variant : library.variants) {
    names += std::string(names.empty() ? "" : ", ") + variant.name;
  }
  return names;
}

ffi::Error moe_mlp(const GpuLibrary& library, cudaStream_t stream, const MoeMlpCall& call,
                   const InputScales& scales) {
  const std::string op = "moe_mlp (" + std::string(library.name) + ")";
  Check check(op);
  check_names(check, library, call.variant, call.format, call.tactic);
  check_activation(check, call.activation);
  check_sizes(check, call);
  if (!check.ok()) return check.error();

  cuda::MlpArgs args;
  args.format = format_of(*find_variant(library, call.variant), call.format);
  args.activation = static_cast<cuda::Activation>(*cpu::parse_activation(call.activation));
  const bool gated = cuda::is_gated(args.activation);
  check_buffers(check, call, {kBf16, kF16},
                cuda::matrix_bytes(args.format, call.intermediate_size, call.hidden_size, gated),
                cuda::matrix_bytes(args.format, call.hidden_size, call.intermediate_size, false));
  if (!scales.empty()) {
    check_optional(check, "gate_up_input_scale", scales[0], {1});
    check_optional(check, "down_input_scale", scales[1], {1});
  }
  check_experts(check, call.experts(), cuda::kMaxExperts);
  check_int32(check, "tokens times top_k", call.tokens() * call.top_k());
  check_int32(check, "hidden_size", call.hidden_size);
  check_int32(check, "twice intermediate_size", 2 * call.intermediate_size);
  check.require(call.top_k() > 0, "expert_ids must have at least one choice for each token, got " +
                                      describe(call.expert_ids));
  check_aligned(check, "x", call.x, kRowBytes);
  check_aligned(check, "gate_up", call.gate_up, kRowBytes);
  check_aligned(check, "down", call.down, kRowBytes);
  check_aligned(check, "out", call.out, kRowBytes);
  args.shape = {call.tokens(), call.hidden_size, call.intermediate_size, call.experts(),
                call.top_k()};
  if (check.ok()) {
    check_workspace(check, call.workspace,
                    gpu_workspace_bytes(cuda::mlp_workspace_bytes(args.format, args.shape)));
  }
  if (!check.ok()) return check.error();
  if (call.out.element_count() == 0) return ffi::Error::Success();

  args.dtype = dtype_of(call.x);
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
  args.x_scale = scales.empty() ? nullptr : optional_data(scales[0]);
  args.h_scale = scales.empty() ? nullptr : optional_data(scales[1]);
  args.expert_ids = data<const int32_t>(call.expert_ids);
  args.weights = data<const float>(call.weights);
  args.expert_offset = data<const int32_t>(call.expert_offset);
  args.out = call.out.untyped_data();
  return finished(op,
                  std::string(call.variant) + " of " + std::string(call.format) + ", x " +
                      describe(call.x) + ", expert_ids " + describe(call.expert_ids) +
                      ", E=" + text(call.experts()) + ", I=" + text(call.intermediate_size) +
                      ", tactic " + quoted(call.tactic),
                  cuda::moe_mlp(library.family, args, std::string(call.tactic),
                                aligned(call.workspace), stream));
}

ffi::Error grouped_matmul(const GpuLibrary& library, cudaStream_t stream,
                          const GroupedMatmulCall& call, const InputScales& scales) {
  const std::string op = "grouped_matmul (" + std::string(library.name) + ")";
  Check check(op);
  check_names(check, library, call.variant, call.format, call.tactic);
  check_sizes(check, call);
  check.require(
      call.n % 8 == 0,
      "n must be a multiple of 8 (the kernel writes 16 bytes at a time), got " + text(call.n));
  if (!check.ok()) return check.error();

  cuda::GroupedArgs args;
  args.format = format_of(*find_variant(library, call.variant), call.format);
  check_buffers(check, call, {kBf16, kF16}, {call.x.element_type()},
                cuda::matrix_bytes(args.format, call.n, call.k, false));
  if (!scales.empty()) check_optional(check, "input_scale", scales[0], {1});
  check.require(call.experts() > 0, "w must hold at least one expert, got " + describe(call.w));
  check_experts(check, call.experts(), cuda::kMaxExperts);
  check_int32(check, "rows of x", call.rows());
  check_int32(check, "n", call.n);
  check_int32(check, "k", call.k);
  check_aligned(check, "x", call.x, kRowBytes);
  check_aligned(check, "w", call.w, kRowBytes);
  check_aligned(check, "out", call.out, kRowBytes);
  args.shape = {call.rows(), call.n, call.k, call.experts(), call.groups()};
  if (check.ok()) {
    check_workspace(check, call.workspace,
                    gpu_workspace_bytes(cuda::grouped_workspace_bytes(args.format, args.shape)));
  }
  if (!check.ok()) return check.error();
  if (call.out.element_count() == 0) return ffi::Error::Success();

  args.dtype = dtype_of(call.x);
  args.x = call.x.untyped_data();
  args.w = data<const uint8_t>(call.w);
  args.w_global = data<const float>(call.w_global);
  args.bias = optional_data(call.bias);
  args.x_scale = scales.empty() ? nullptr : optional_data(scales[0]);
  args.group_sizes = data<const int32_t>(call.group_sizes);
  args.group_offset = data<const int32_t>(call.group_offset);
  args.out = call.out.untyped_data();
  return finished(op,
                  std::string(call.variant) + " of " + std::string(call.format) + ", x " +
                      describe(call.x) + ", group_sizes " + describe(call.group_sizes) +
                      ", E=" + text(call.experts()) + ", n=" + text(call.n) + ", tactic " +
                      quoted(call.tactic),
                  cuda::grouped_matmul(library.family, args, std::string(call.tactic),
                                       aligned(call.workspace), stream));
}

}  // namespace jaxmoe
