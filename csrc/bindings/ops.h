// The two operations as the handlers of every library take them: operands and attributes in XLA's
// order, the binding of that order, and the checks that do not depend on the library.
#ifndef JAXMOE_CSRC_BINDINGS_OPS_H_
#define JAXMOE_CSRC_BINDINGS_OPS_H_

#include <array>
#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>

#include "bindings/check.h"
#include "cpu/types.h"
#include "xla/ffi/api/ffi.h"

namespace jaxmoe {

inline int64_t dimension(const ffi::AnyBuffer& buffer, size_t axis) {
  return axis < buffer.dimensions().size() ? buffer.dimensions()[axis] : 0;
}
template <class T>
T* data(const ffi::AnyBuffer& buffer) {
  return static_cast<T*>(buffer.untyped_data());
}
// Null for an absent operand, which is f32[0].
inline const float* optional_data(const ffi::AnyBuffer& buffer) {
  return buffer.element_count() ? data<const float>(buffer) : nullptr;
}

struct MoeMlpCall {
  ffi::AnyBuffer x, gate_up, gate_up_global, down, down_global, gate_up_bias, down_bias,
      activation_params, expert_ids, weights, expert_offset, out, workspace;
  std::string_view variant, format, activation;
  int64_t hidden_size, intermediate_size;
  bool weight_on_input;
  std::string_view tactic;
  std::string_view compute = {};  // of the libraries that bind it

  int64_t tokens() const { return dimension(x, 0); }
  int64_t experts() const { return dimension(gate_up, 0); }
  int64_t top_k() const { return dimension(expert_ids, 1); }
};

struct GroupedMatmulCall {
  ffi::AnyBuffer x, w, w_global, bias, group_sizes, group_offset, out, workspace;
  std::string_view variant, format;
  int64_t n, k;
  std::string_view tactic;
  std::string_view compute = {};  // as above

  int64_t rows() const { return dimension(x, 0); }
  int64_t experts() const { return dimension(w, 0); }
  int64_t groups() const { return dimension(group_sizes, 0); }
};

// The checks, in this order; each needs those before it to have passed.
void check_format(Check& check, std::string_view format);
void check_activation(Check& check, std::string_view activation);
void check_sizes(Check& check, const MoeMlpCall& call);
void check_sizes(Check& check, const GroupedMatmulCall& call);
// The bytes are those of one expert's matrix in the library's layout.
void check_buffers(Check& check, const MoeMlpCall& call,
                   std::initializer_list<ffi::DataType> x_dtypes, int64_t gate_up_bytes,
                   int64_t down_bytes);
void check_buffers(Check& check, const GroupedMatmulCall& call,
                   std::initializer_list<ffi::DataType> x_dtypes,
                   std::initializer_list<ffi::DataType> out_dtypes, int64_t w_bytes);
void check_workspace(Check& check, const ffi::AnyBuffer& workspace, int64_t needed);
// f32 of `dims`, or f32[0] where there is none.
void check_optional(Check& check, const char* name, const ffi::AnyBuffer& buffer,
                    const std::vector<int64_t>& dims);

// At least one: a binding itself can be neither copied nor moved.
template <size_t count, class Binding>
auto bind_buffers(Binding&& binding) {
  if constexpr (count == 1) {
    return std::move(binding).template Arg<ffi::AnyBuffer>();
  } else {
    return bind_buffers<count - 1>(std::move(binding).template Arg<ffi::AnyBuffer>());
  }
}

// `Context` is what XLA passes before the operands: a thread pool, a stream. A library's own
// attributes are bound after these; `scales` is the number of input scales that it takes.
template <class Context, size_t scales = 0>
auto moe_mlp_binding() {
  return bind_buffers<1 + scales>(  // activation_params, input scales
             ffi::Ffi::Bind()
                 .Ctx<Context>()
                 .template Arg<ffi::AnyBuffer>()   // x
                 .template Arg<ffi::AnyBuffer>()   // gate_up
                 .template Arg<ffi::AnyBuffer>()   // gate_up_global
                 .template Arg<ffi::AnyBuffer>()   // down
                 .template Arg<ffi::AnyBuffer>()   // down_global
                 .template Arg<ffi::AnyBuffer>()   // gate_up_bias
                 .template Arg<ffi::AnyBuffer>())  // down_bias
      .template Arg<ffi::AnyBuffer>()              // expert_ids
      .template Arg<ffi::AnyBuffer>()              // weights
      .template Arg<ffi::AnyBuffer>()              // expert_offset
      .template Ret<ffi::AnyBuffer>()              // out
      .template Ret<ffi::AnyBuffer>()              // workspace
      .template Attr<std::string_view>("variant")
      .template Attr<std::string_view>("format")
      .template Attr<std::string_view>("activation")
      .template Attr<int64_t>("hidden_size")
      .template Attr<int64_t>("intermediate_size")
      .template Attr<bool>("weight_on_input");
}

template <class Context, size_t scales = 0>
auto grouped_matmul_binding() {
  return bind_buffers<1 + scales>(  // bias, input scale
             ffi::Ffi::Bind()
                 .Ctx<Context>()
                 .template Arg<ffi::AnyBuffer>()   // x
                 .template Arg<ffi::AnyBuffer>()   // w
                 .template Arg<ffi::AnyBuffer>())  // w_global
      .template Arg<ffi::AnyBuffer>()              // group_sizes
      .template Arg<ffi::AnyBuffer>()              // group_offset
      .template Ret<ffi::AnyBuffer>()              // out
      .template Ret<ffi::AnyBuffer>()              // workspace
      .template Attr<std::string_view>("variant")
      .template Attr<std::string_view>("format")
      .template Attr<int64_t>("n")
      .template Attr<int64_t>("k");
}

template <class T>
T plain(T value) {
  return value;
}
inline ffi::AnyBuffer plain(ffi::Result<ffi::AnyBuffer> result) { return *result; }

// What XLA calls with the values of a binding: `run(context, call)`.
template <class Call, auto run>
constexpr auto handle = [](auto context, auto... values) -> ffi::Error {
  return run(std::move(context), Call{plain(values)...});
};

// The same for a library with input scales, which come after the first `before` operands:
// `run(context, call, scales)`.
template <class Call, auto run, size_t before, class Context, class Values, size_t... i,
          size_t... j>
ffi::Error run_scaled(Context context, const Values& values, std::index_sequence<i...>,
                      std::index_sequence<j...>) {
  return run(std::move(context), Call{std::get<(i < before ? i : i + sizeof...(j))>(values)...},
             std::array{std::get<before + j>(values)...});
}
template <class Call, auto run, size_t before, size_t count>
constexpr auto handle_scaled = [](auto context, auto... values) -> ffi::Error {
  return run_scaled<Call, run, before>(std::move(context), std::tuple{plain(values)...},
                                       std::make_index_sequence<sizeof...(values) - count>(),
                                       std::make_index_sequence<count>());
};

}  // namespace jaxmoe

#endif  // JAXMOE_CSRC_BINDINGS_OPS_H_
