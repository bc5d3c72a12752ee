#include "bindings/check.h"

namespace jaxmoe {
namespace {

std::string dims_text(const std::vector<int64_t>& dims) {
  std::string text = "[";
  for (size_t i = 0; i < dims.size(); ++i) {
    if (i) text += ",";
    text += dims[i] < 0 ? "*" : std::to_string(dims[i]);
  }
  return text + "]";
}

}  // namespace

std::string text(int64_t value) { return std::to_string(value); }
std::string quoted(std::string_view value) { return "'" + std::string(value) + "'"; }

std::string dtype_name(ffi::DataType dtype) {
  switch (dtype) {
    case ffi::DataType::PRED:
      return "bool";
    case ffi::DataType::U8:
      return "u8";
    case ffi::DataType::S8:
      return "i8";
    case ffi::DataType::S32:
      return "i32";
    case ffi::DataType::U32:
      return "u32";
    case ffi::DataType::S64:
      return "i64";
    case ffi::DataType::F16:
      return "f16";
    case ffi::DataType::BF16:
      return "bf16";
    case ffi::DataType::F32:
      return "f32";
    case ffi::DataType::F64:
      return "f64";
    default:
      return "dtype#" + std::to_string(static_cast<int>(dtype));
  }
}

std::string describe(const ffi::AnyBuffer& buffer) {
  const auto dims = buffer.dimensions();
  return dtype_name(buffer.element_type()) + dims_text({dims.begin(), dims.end()});
}

Check& Check::buffer(const char* name, const ffi::AnyBuffer& buffer,
                     std::initializer_list<ffi::DataType> dtypes,
                     const std::vector<int64_t>& dims) {
  if (!ok()) return *this;
  const auto actual = buffer.dimensions();
  bool fits = actual.size() == dims.size();
  for (size_t i = 0; fits && i < dims.size(); ++i) fits = dims[i] < 0 || dims[i] == actual[i];
  bool known = false;
  std::string names;
  for (const ffi::DataType dtype : dtypes) {
    known = known || dtype == buffer.element_type();
    if (!names.empty()) names += "|";
    names += dtype_name(dtype);
  }
  return require(fits && known, std::string(name) + " must be " + names + dims_text(dims) +
                                    ", got " + describe(buffer));
}

Check& Check::require(bool condition, const std::string& complaint) {
  if (ok() && !condition) message_ = op_ + ": " + complaint;
  return *this;
}

}  // namespace jaxmoe
