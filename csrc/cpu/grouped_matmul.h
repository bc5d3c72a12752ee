// Ragged matmul on packed FP4 weights: rows of group g = group_offset + e are multiplied by expert
// e's W[N, K]^T; rows of other groups and rows past the groups are zero.
//
// - zero, by ranges of rows: those outside the local groups (a prefix and a suffix)
// - gemm, by (segment, panel): gather a group's rows of x, then per panel multiply, scale, add the
//   bias, store
#ifndef JAXMOE_CSRC_CPU_GROUPED_MATMUL_H_
#define JAXMOE_CSRC_CPU_GROUPED_MATMUL_H_

#include <cstdint>

#include "cpu/kernels.h"
#include "cpu/threads.h"
#include "cpu/types.h"

namespace jaxmoe::cpu {

struct GroupedMatmulArgs {
  const Kernels* kernels = nullptr;  // that this machine can run
  Format format = Format::kNvfp4;
  Compute compute = Compute::kW4a16;
  Dtype x_dtype = Dtype::kF32, out_dtype = Dtype::kF32;
  Tactic tactic = Tactic::kAuto;
  int64_t rows = 0, n = 0, k = 0, num_experts = 0, num_groups = 0;
  int64_t group_offset = 0;

  const void* x = nullptr;               // [M, K]
  const uint8_t* w = nullptr;            // packed, per expert
  const float* w_global = nullptr;       // [E]
  const float* bias = nullptr;           // [E, N], or null
  const int32_t* group_sizes = nullptr;  // [G]; whatever they are, no row outside [0, M) is touched
  void* out = nullptr;                   // [M, N]
};

// Bytes per expert of the packed operand.
int64_t grouped_matmul_bytes(Format format, int64_t n, int64_t k);

// As moe_mlp: false if memory for a thread's scratch ran out.
bool grouped_matmul(const GroupedMatmulArgs& args, Executor* executor);

}  // namespace jaxmoe::cpu

#endif  // JAXMOE_CSRC_CPU_GROUPED_MATMUL_H_
