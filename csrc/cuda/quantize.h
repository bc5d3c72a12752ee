// Rows of 16-bit floats to e4m3, for products with 8-bit activations. For every SM family from 89
// on.
#ifndef JAXMOE_CSRC_CUDA_QUANTIZE_H_
#define JAXMOE_CSRC_CUDA_QUANTIZE_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jaxmoe::cuda {

// out = e4m3(x / scale), rounded to nearest even, where a row's scale is the smallest power of two
// with max |x| / scale <= 448 (1 for a row of zeros; at least 2^-126), or else `fixed`: then x is
// multiplied by 1 / fixed, both rounded to float32, and what is beyond 448 becomes 448. A row that
// holds an infinity or NaN gets a scale of NaN, so that its results are NaN too.
struct QuantizeArgs {
  const void* x;  // [rows, k], bf16 or fp16; k a multiple of 8
  bool fp16;
  int rows;
  int k;
  const float* fixed;  // [], the scale of every row; or null
  const int32_t* end;  // [], rows from *end on are left out; or null
  const int32_t*
      position_of;  // [rows, copies]: rows of out to write, -1 for none; or null: the row
  int copies;
  void* out;     // [positions, k], e4m3
  float* scale;  // [rows]
};
cudaError_t quantize_rows(const QuantizeArgs& args, cudaStream_t stream);

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_CSRC_CUDA_QUANTIZE_H_
