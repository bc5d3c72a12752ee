// From expert ids to sorted positions, and back from sorted results to tokens. For every SM family.
#ifndef JAXMOE_CSRC_CUDA_ROUTE_H_
#define JAXMOE_CSRC_CUDA_ROUTE_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace jaxmoe::cuda {

inline constexpr int kMaxExperts = 1024;  // of one call: blocks of threads keep tables of them

// A stable counting sort of the pairs (token, choice) by expert. Pairs whose expert is not in
// [expert_offset, expert_offset + experts) get no position.
struct SortArgs {
  const int32_t* expert_ids;     // [pairs]
  const int32_t* expert_offset;  // []
  int pairs;
  int top_k;
  int experts;
  int32_t* offsets;      // [experts + 1], out: expert e has the positions offsets[e] ...
  int32_t* token_of;     // [pairs], out: token at each position
  int32_t* pair_of;      // [pairs], out: pair at each position
  int32_t* position_of;  // [pairs], out: position of each pair, or -1
  int32_t* counts;       // [sort_count_elements], scratch
};
int64_t sort_count_elements(int64_t pairs, int64_t experts);
cudaError_t sort_pairs(const SortArgs& args, cudaStream_t stream);

// out[position_of[t, j]] = x[t] for every pair that has a position; rows of `row_bytes`, a multiple
// of
// 16. Each row of x is read once.
cudaError_t gather_rows(const void* x, const int32_t* position_of, int tokens, int top_k,
                        int64_t row_bytes, void* out, cudaStream_t stream);

// offsets[e] = rows before group group_offset + e, for rows that are sorted already.
struct GroupArgs {
  const int32_t* group_sizes;   // [groups]
  const int32_t* group_offset;  // []
  int groups;
  int experts;
  int rows;
  int32_t* offsets;  // [experts + 1], out
};
cudaError_t group_offsets(const GroupArgs& args, cudaStream_t stream);

// Zeroes the rows of `out` that no expert has.
cudaError_t clear_other_rows(const int32_t* offsets, int experts, void* out, int rows,
                             int64_t row_bytes, cudaStream_t stream);

// out[t] = sum over j, in order, of weights[t, j] * y[t, j]; pairs of other shards are left out.
struct CombineArgs {
  const void* y;                 // [tokens, top_k, hidden], bf16 or fp16
  const float* weights;          // [tokens, top_k], or null for ones
  const int32_t* expert_ids;     // [tokens, top_k]
  const int32_t* expert_offset;  // []
  void* out;                     // [tokens, hidden]
  int tokens;
  int top_k;
  int hidden;
  int experts;
  bool fp16;
};
cudaError_t combine(const CombineArgs& args, cudaStream_t stream);

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_CSRC_CUDA_ROUTE_H_
