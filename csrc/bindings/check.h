// Checks of FFI operands whose messages name the argument, what was required and what came.
#ifndef JAXMOE_CSRC_BINDINGS_CHECK_H_
#define JAXMOE_CSRC_BINDINGS_CHECK_H_

#include <cstdint>
#include <initializer_list>
#include <string>
#include <string_view>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace jaxmoe {

namespace ffi = xla::ffi;

// Keeps the first complaint; later checks are then skipped.
class Check {
 public:
  explicit Check(std::string op) : op_(std::move(op)) {}

  bool ok() const { return message_.empty(); }
  ffi::Error error() const { return ffi::Error::InvalidArgument(message_); }

  // A dimension of -1 may be anything.
  Check& buffer(const char* name, const ffi::AnyBuffer& buffer,
                std::initializer_list<ffi::DataType> dtypes, const std::vector<int64_t>& dims);
  Check& require(bool condition, const std::string& complaint);

 private:
  std::string op_;
  std::string message_;
};

std::string text(int64_t value);
// 'value'
std::string quoted(std::string_view value);
std::string dtype_name(ffi::DataType dtype);
// "f32[2,3]"
std::string describe(const ffi::AnyBuffer& buffer);

}  // namespace jaxmoe

#endif  // JAXMOE_CSRC_BINDINGS_CHECK_H_
