// One grouped product on the device's own arguments, as every tactic offers it. CUTLASS stays
// behind this header.
#ifndef JAXMOE_CSRC_BLACKWELL_GEMM_H_
#define JAXMOE_CSRC_BLACKWELL_GEMM_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <string>

#include "blackwell/layout.h"

namespace jaxmoe::blackwell {

// The bytes of CUTLASS's layout of block scales, of which the dynamic parts are written on the
// device (arguments.cu).
struct alignas(4) ScaleLayoutBytes {
  uint8_t bytes[20];
};

// What a product reads for each expert, in arrays on the device: D^T[n, row] = W[n, k] X^T[k, row],
// so that tokens lie along N and small tiles along N serve few tokens.
struct Groups {
  struct Shape {
    int32_t m, n, k;  // outputs, rows of the expert, K
  };
  Shape* shape;
  const void** weights;
  const void** weight_scales;
  const void** rows;
  const void** row_scales;
  void** out;              // bf16
  int64_t* weight_stride;  // in elements
  int64_t* row_stride;
  int64_t* out_stride;
  ScaleLayoutBytes* weight_scale_layout;
  ScaleLayoutBytes* row_scale_layout;
};

// Multiprocessors that a product uses at most; its scratch is sized by them.
inline constexpr int kMaxMultiprocessors = 256;

struct Tactic {
  const char* name;
  Format format;
  int tokens;      // of a tile
  int smem_bytes;  // of a thread block
  int64_t (*workspace_bytes)();
  // "" or what went wrong. Enqueues one kernel, after those already on the stream.
  std::string (*run)(const Groups& groups, int experts, int multiprocessors, void* workspace,
                     cudaStream_t stream);
};

// The tactics of the library that is compiled (csrc/sm100, csrc/sm120), in order of their tiles.
extern const Tactic* const kTactics[];
extern const int kNumTactics;

}  // namespace jaxmoe::blackwell

#endif  // JAXMOE_CSRC_BLACKWELL_GEMM_H_
