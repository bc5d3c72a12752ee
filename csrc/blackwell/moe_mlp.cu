// sort -> arguments -> quantise x -> product -> activate and quantise h -> product -> combine.
#include <algorithm>

#include "blackwell/arguments.h"
#include "blackwell/combine.h"
#include "blackwell/gemm.h"
#include "blackwell/moe_mlp.h"
#include "blackwell/quantize.h"

namespace jaxmoe::blackwell {
namespace {

// Hands out parts of the workspace; with a null base it only adds up.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<uint8_t*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    uint8_t* p = base_ + used_;
    used_ += round_up(count * static_cast<int64_t>(sizeof(T)), 256);
    return reinterpret_cast<T*>(p);
  }
  int64_t used() const { return used_; }

 private:
  uint8_t* base_;
  int64_t used_ = 0;
};

Groups take_groups(Arena* arena, int64_t experts) {
  Groups g;
  g.shape = arena->take<Groups::Shape>(experts);
  g.weights = arena->take<const void*>(experts);
  g.weight_scales = arena->take<const void*>(experts);
  g.rows = arena->take<const void*>(experts);
  g.row_scales = arena->take<const void*>(experts);
  g.out = arena->take<void*>(experts);
  g.weight_stride = arena->take<int64_t>(experts);
  g.row_stride = arena->take<int64_t>(experts);
  g.out_stride = arena->take<int64_t>(experts);
  g.weight_scale_layout = arena->take<ScaleLayoutBytes>(experts);
  g.row_scale_layout = arena->take<ScaleLayoutBytes>(experts);
  return g;
}

// Of all tactics, so that a workspace does for any.
int64_t gemm_workspace_bytes() {
  static const int64_t bytes = [] {
    int64_t most = 0;
    for (int i = 0; i < kNumTactics; ++i) most = std::max(most, kTactics[i]->workspace_bytes());
    return most;
  }();
  return bytes;
}

// What both operations need: the sorted rows and, for one or two products, their operands.
struct Workspace {
  int32_t *offsets, *expert_of, *scale_row;
  uint8_t *codes, *scales;  // of x, then of h
  float* row_scale[2];
  uint16_t* product;  // the first product's result, then the second's
  Groups groups[2];
  uint8_t* gemm[2];

  Workspace(Arena* arena, Format format, int64_t positions, int64_t experts, int64_t widest_k,
            int64_t widest_out, int products) {
    // The last expert's tile of 128 rows may reach past its own.
    const int64_t scale_rows =
        round_up(positions + experts * (kScaleRows - 1), kScaleRows) + kScaleRows;
    offsets = arena->take<int32_t>(experts + 1);
    expert_of = arena->take<int32_t>(positions);
    scale_row = arena->take<int32_t>(positions);
    codes = arena->take<uint8_t>(positions * row_bytes(format, widest_k));
    scales = arena->take<uint8_t>(scale_bytes(format, scale_rows, widest_k));
    product = arena->take<uint16_t>(positions * widest_out);
    for (int i = 0; i < products; ++i) {
      row_scale[i] = arena->take<float>(positions);
      groups[i] = take_groups(arena, experts);
      gemm[i] = arena->take<uint8_t>(gemm_workspace_bytes());
    }
  }

  QuantizedRows quantized(Format format, int64_t k, const float* input_scale, int product) const {
    return {format, static_cast<int>(k), input_scale, scale_row, codes, scales, row_scale[product]};
  }
  Product operands(int index, const uint8_t* weights, int64_t outputs, int64_t k) const {
    return {groups[index],      weights, codes, scales, product, static_cast<int>(outputs),
            static_cast<int>(k)};
  }
};

struct MlpWorkspace : Workspace {
  int32_t *token_of, *pair_of, *position_of, *counts;

  MlpWorkspace(Arena* arena, Format format, const MlpShape& s, bool gated)
      : Workspace(arena, format, s.tokens * s.top_k, s.experts, std::max(s.hidden, s.intermediate),
                  std::max(s.hidden, (gated ? 2 : 1) * s.intermediate), 2) {
    const int64_t pairs = s.tokens * s.top_k;
    token_of = arena->take<int32_t>(pairs);
    pair_of = arena->take<int32_t>(pairs);
    position_of = arena->take<int32_t>(pairs);
    counts = arena->take<int32_t>(cuda::sort_count_elements(pairs, s.experts));
  }
};

Workspace grouped_workspace(Arena* arena, Format format, const GroupedShape& s) {
  return Workspace(arena, format, s.rows, s.experts, s.k, s.n, 1);
}

std::string failed(const char* what, cudaError_t error) {
  return std::string(what) + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error);
}

// The tactic of a name, or of the library's choice for the empty one: the smallest tile of tokens
// that has room for the rows of an expert, if all experts that can have one have as many.
const Tactic* find(Format format, const std::string& name, int64_t rows, int64_t experts) {
  const int64_t mean = rows / std::max<int64_t>(1, std::min(rows, experts));
  const Tactic* found = nullptr;
  for (int i = 0; i < kNumTactics; ++i) {
    const Tactic* t = kTactics[i];
    if (t->format != format) continue;
    if (!name.empty()) {
      if (name == t->name) return t;
    } else if (!found || (found->tokens < mean && found->tokens < t->tokens)) {
      found = t;
    }
  }
  return found;
}

std::string unknown_tactic(Format format, const std::string& name) {
  std::string names;
  for (const TacticInfo& t : tactics(format))
    names += (names.empty() ? "" : ", ") + std::string(t.name);
  return "tactic must be one of " + names + ", got '" + name + "'";
}

std::string count_multiprocessors(int* count) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
  }
  return error == cudaSuccess ? "" : failed("cudaDeviceGetAttribute", error);
}

}  // namespace

std::vector<TacticInfo> tactics(Format format) {
  std::vector<TacticInfo> list;
  for (int i = 0; i < kNumTactics; ++i) {
    if (kTactics[i]->format == format) list.push_back({kTactics[i]->name, kTactics[i]->smem_bytes});
  }
  return list;
}

const char* default_tactic(Format format, int64_t rows, int64_t experts) {
  return find(format, "", rows, experts)->name;
}

int64_t mlp_workspace_bytes(Format format, const MlpShape& shape, bool gated) {
  Arena arena(nullptr);
  MlpWorkspace(&arena, format, shape, gated);
  return arena.used();
}

int64_t grouped_workspace_bytes(Format format, const GroupedShape& shape) {
  Arena arena(nullptr);
  grouped_workspace(&arena, format, shape);
  return arena.used();
}

std::string moe_mlp(const MlpArgs& a, const std::string& name, void* workspace,
                    cudaStream_t stream) {
  const MlpShape& s = a.shape;
  if (s.tokens == 0) return "";
  const int64_t pairs = s.tokens * s.top_k;
  const Tactic* tactic = find(a.format, name, pairs, s.experts);
  if (!tactic) return unknown_tactic(a.format, name);
  int multiprocessors = 0;
  std::string complaint = count_multiprocessors(&multiprocessors);
  if (!complaint.empty()) return complaint;

  const bool gated = cuda::is_gated(a.activation);
  const int experts = static_cast<int>(s.experts);
  Arena arena(workspace);
  const MlpWorkspace w(&arena, a.format, s, gated);

  cuda::SortArgs sort{};
  sort.expert_ids = a.expert_ids;
  sort.expert_offset = a.expert_offset;
  sort.pairs = static_cast<int>(pairs);
  sort.top_k = static_cast<int>(s.top_k);
  sort.experts = experts;
  sort.offsets = w.offsets;
  sort.token_of = w.token_of;
  sort.pair_of = w.pair_of;
  sort.position_of = w.position_of;
  sort.counts = w.counts;
  cudaError_t error = cuda::sort_pairs(sort, stream);
  if (error != cudaSuccess) return failed("sort_pairs", error);

  ArgumentsOf arguments{};
  arguments.format = a.format;
  arguments.offsets = w.offsets;
  arguments.experts = experts;
  arguments.positions = sort.pairs;
  arguments.expert_of = w.expert_of;
  arguments.scale_row = w.scale_row;
  arguments.products[0] = w.operands(0, a.gate_up, (gated ? 2 : 1) * s.intermediate, s.hidden);
  arguments.products[1] = w.operands(1, a.down, s.hidden, s.intermediate);
  arguments.num_products = 2;
  error = make_arguments(arguments, stream);
  if (error != cudaSuccess) return failed("make_arguments", error);

  QuantizeInput input{};
  input.x = a.x;
  input.rows = static_cast<int>(s.tokens);
  input.row_weight = a.weight_on_input ? a.weights : nullptr;
  input.position_of = w.position_of;
  input.copies = sort.top_k;
  input.expert_of = w.expert_of;
  error = quantize_input(input, w.quantized(a.format, s.hidden, a.gate_up_input_scale, 0), stream);
  if (error != cudaSuccess) return failed("quantize_input", error);

  complaint = tactic->run(w.groups[0], experts, multiprocessors, w.gemm[0], stream);
  if (!complaint.empty()) return "first product: " + complaint;

  QuantizeHidden hidden{};
  hidden.product = w.product;
  hidden.positions = sort.pairs;
  hidden.expert_of = w.expert_of;
  hidden.product_scale = w.row_scale[0];
  hidden.global_scale = a.gate_up_global;
  hidden.bias = a.gate_up_bias;
  hidden.activation = a.activation;
  hidden.params = a.params;
  hidden.num_params = a.num_params;
  hidden.experts = experts;
  error =
      quantize_hidden(hidden, w.quantized(a.format, s.intermediate, a.down_input_scale, 1), stream);
  if (error != cudaSuccess) return failed("quantize_hidden", error);

  complaint = tactic->run(w.groups[1], experts, multiprocessors, w.gemm[1], stream);
  if (!complaint.empty()) return "second product: " + complaint;

  CombineArgs sum{};
  sum.product = w.product;
  sum.columns = static_cast<int>(s.hidden);
  sum.row_scale = w.row_scale[1];
  sum.expert_of = w.expert_of;
  sum.global_scale = a.down_global;
  sum.bias = a.down_bias;
  sum.weights = a.weight_on_input ? nullptr : a.weights;
  sum.position_of = w.position_of;
  sum.tokens = static_cast<int>(s.tokens);
  sum.top_k = sort.top_k;
  sum.out = a.out;
  error = combine(sum, stream);
  return error == cudaSuccess ? "" : failed("combine", error);
}

std::string grouped_matmul(const GroupedArgs& a, const std::string& name, void* workspace,
                           cudaStream_t stream) {
  const GroupedShape& s = a.shape;
  if (s.rows == 0) return "";
  const Tactic* tactic = find(a.format, name, s.rows, s.experts);
  if (!tactic) return unknown_tactic(a.format, name);
  int multiprocessors = 0;
  std::string complaint = count_multiprocessors(&multiprocessors);
  if (!complaint.empty()) return complaint;

  const int experts = static_cast<int>(s.experts), rows = static_cast<int>(s.rows);
  Arena arena(workspace);
  const Workspace w = grouped_workspace(&arena, a.format, s);

  cuda::GroupArgs group{};
  group.group_sizes = a.group_sizes;
  group.group_offset = a.group_offset;
  group.groups = static_cast<int>(s.groups);
  group.experts = experts;
  group.rows = rows;
  group.offsets = w.offsets;
  cudaError_t error = cuda::group_offsets(group, stream);
  if (error != cudaSuccess) return failed("group_offsets", error);

  ArgumentsOf arguments{};
  arguments.format = a.format;
  arguments.offsets = w.offsets;
  arguments.experts = experts;
  arguments.positions = rows;
  arguments.expert_of = w.expert_of;
  arguments.scale_row = w.scale_row;
  arguments.products[0] = w.operands(0, a.w, s.n, s.k);
  arguments.num_products = 1;
  error = make_arguments(arguments, stream);
  if (error != cudaSuccess) return failed("make_arguments", error);

  QuantizeInput input{};
  input.x = a.x;
  input.rows = rows;
  input.copies = 1;
  input.expert_of = w.expert_of;
  error = quantize_input(input, w.quantized(a.format, s.k, a.input_scale, 0), stream);
  if (error != cudaSuccess) return failed("quantize_input", error);

  complaint = tactic->run(w.groups[0], experts, multiprocessors, w.gemm[0], stream);
  if (!complaint.empty()) return "grouped product: " + complaint;

  CombineArgs finish{};
  finish.product = w.product;
  finish.columns = static_cast<int>(s.n);
  finish.row_scale = w.row_scale[0];
  finish.expert_of = w.expert_of;
  finish.global_scale = a.w_global;
  finish.bias = a.bias;
  finish.tokens = rows;
  finish.top_k = 1;
  finish.out = a.out;
  error = combine(finish, stream);
  return error == cudaSuccess ? "" : failed("combine", error);
}

}  // namespace jaxmoe::blackwell
