// Tensor maps of row-major matrices, for copies of boxes into swizzled shared memory.
#ifndef JAXMOE_CSRC_CUDA_TENSOR_MAP_H_
#define JAXMOE_CSRC_CUDA_TENSOR_MAP_H_

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

namespace jaxmoe::cuda {

// Boxes of `box_rows` rows by 128 bytes of columns (128-byte swizzle) of a [rows, columns] matrix
// of `type`: UINT8 or a 16-bit one. What lies outside of it reads as zero.
cudaError_t make_row_map(const void* data, int64_t rows, int64_t columns, int box_rows,
                         CUtensorMapDataType type, CUtensorMap* map);

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_CSRC_CUDA_TENSOR_MAP_H_
