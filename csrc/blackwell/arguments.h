// What the products read for each expert, made on the device from the experts' offsets.
#ifndef JAXMOE_CSRC_BLACKWELL_ARGUMENTS_H_
#define JAXMOE_CSRC_BLACKWELL_ARGUMENTS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "blackwell/gemm.h"

namespace jaxmoe::blackwell {

struct Product {
  Groups groups;           // out
  const uint8_t* weights;  // [experts, matrix_bytes(format, outputs, k)]
  const uint8_t* codes;    // of the sorted rows
  const uint8_t* scales;
  void* out;  // [positions, outputs], bf16
  int outputs;
  int k;
};

struct ArgumentsOf {
  Format format;
  const int32_t* offsets;  // [experts + 1]
  int experts;
  int positions;
  int32_t* expert_of;  // [positions], out: -1 for a row that no expert has
  int32_t* scale_row;  // [positions], out
  Product products[2];
  int num_products;
};
cudaError_t make_arguments(const ArgumentsOf& args, cudaStream_t stream);

}  // namespace jaxmoe::blackwell

#endif  // JAXMOE_CSRC_BLACKWELL_ARGUMENTS_H_
