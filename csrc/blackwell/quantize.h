// Rows of activations as the products read them: x of the tokens, and h = activation(gate, up).
#ifndef JAXMOE_CSRC_BLACKWELL_QUANTIZE_H_
#define JAXMOE_CSRC_BLACKWELL_QUANTIZE_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "blackwell/layout.h"
#include "cuda/activations.h"

namespace jaxmoe::blackwell {

// Rows in sorted order, with their scales in the swizzled order of layout.h.
struct QuantizedRows {
  Format format;
  int k;
  const float* input_scale;  // [], or null: dynamic
  const int32_t* scale_row;  // [positions], where a position's scales lie
  uint8_t* codes;            // [positions, row_bytes(format, k)]
  uint8_t* scales;
  float* row_scale;  // [positions]: g of layout.h
};

struct QuantizeInput {
  const void* x;  // [rows, k], bf16
  int rows;
  const float* row_weight;     // [rows], which multiplies x first; or null
  const int32_t* position_of;  // [rows, copies]: where each row goes, -1 for nowhere; or null:
                               // once, to where it is
  int copies;
  const int32_t* expert_of;  // [positions], negative for a row that no expert has
};
cudaError_t quantize_input(const QuantizeInput& input, const QuantizedRows& rows,
                           cudaStream_t stream);

// rows.k columns of h from the first product, which has the gate columns and then the up columns.
struct QuantizeHidden {
  const void* product;  // [positions, 2 k or k], bf16
  int positions;
  const int32_t* expert_of;
  const float* product_scale;  // [positions]: g of the rows that were multiplied
  const float* global_scale;   // [experts]
  const float* bias;           // [experts, 2 k or k], or null
  cuda::Activation activation;
  const float* params;  // [num_params, experts]
  int num_params;
  int experts;
};
cudaError_t quantize_hidden(const QuantizeHidden& hidden, const QuantizedRows& rows,
                            cudaStream_t stream);

}  // namespace jaxmoe::blackwell

#endif  // JAXMOE_CSRC_BLACKWELL_QUANTIZE_H_
