#include <algorithm>
#include <cstring>

#include "cuda/moe_mlp.h"
#include "cuda/route.h"
#include "cuda/tactics.h"

namespace jaxmoe::cuda {
namespace {

const Tactic* find(const Family& family, Format format, const std::string& name) {
  for (const Tactic* t : family.tactics) {
    if (name == t->name && t->smem_bytes(format) > 0) return t;
  }
  return nullptr;
}

// Hands out parts of the workspace; with a null base it only adds up.
class Arena {
 public:
  explicit Arena(void* base) : base_(static_cast<uint8_t*>(base)) {}
  template <class T>
  T* take(int64_t count) {
    uint8_t* p = base_ + used_;
    used_ += divide_up(count * static_cast<int64_t>(sizeof(T)), 256) * 256;
    return reinterpret_cast<T*>(p);
  }
  int64_t used() const { return used_; }

 private:
  uint8_t* base_;
  int64_t used_ = 0;
};

struct MlpWorkspace {
  int32_t *offsets, *token_of, *pair_of, *position_of, *counts;
  uint16_t* h;  // [pairs, I] in sorted order; I padded to whole blocks for `fused`
  uint16_t* y;  // [pairs, H]: first x in sorted order, then the results in the order of pairs
  // For 8-bit activations: h quantised, and the scales of x and h.
  uint8_t* h8 = nullptr;
  float *x_scale = nullptr, *h_scale = nullptr;
  int64_t bytes;

  MlpWorkspace(void* base, Format format, const MlpShape& s) {
    Arena arena(base);
    const int64_t pairs = s.tokens * s.top_k;
    offsets = arena.take<int32_t>(s.experts + 1);
    token_of = arena.take<int32_t>(pairs);
    pair_of = arena.take<int32_t>(pairs);
    position_of = arena.take<int32_t>(pairs);
    counts = arena.take<int32_t>(sort_count_elements(pairs, s.experts));
    h = arena.take<uint16_t>(pairs * num_blocks(s.intermediate) * kBlockK);
    y = arena.take<uint16_t>(pairs * s.hidden);
    if (is_fp8(format)) {
      h8 = arena.take<uint8_t>(pairs * s.intermediate);
      x_scale = arena.take<float>(s.tokens);
      h_scale = arena.take<float>(pairs);
    }
    bytes = arena.used();
  }
};

struct GroupedWorkspace {
  int32_t* offsets;
  uint8_t* x8 = nullptr;  // x quantised, and its scales
  float* x_scale = nullptr;
  int64_t bytes;

  GroupedWorkspace(void* base, Format format, const GroupedShape& s) {
    Arena arena(base);
    offsets = arena.take<int32_t>(s.experts + 1);
    if (is_fp8(format)) {
      x8 = arena.take<uint8_t>(s.rows * s.k);
      x_scale = arena.take<float>(s.rows);
    }
    bytes = arena.used();
  }
};

std::string failed(const char* what, cudaError_t error) {
  return std::string(what) + ": " + cudaGetErrorName(error) + ", " + cudaGetErrorString(error);
}

// Names of the tactics; of those that can run one product alone where that is asked for.
std::string names(const Family& family, Format format, bool of_products) {
  std::string all;
  for (const Tactic* t : family.tactics) {
    if (t->smem_bytes(format) == 0 || (of_products && !t->run)) continue;
    all += (all.empty() ? "" : ", ") + std::string(t->name);
  }
  return all;
}

std::string count_multiprocessors(int* count) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
  }
  return error == cudaSuccess ? "" : failed("cudaDeviceGetAttribute", error);
}

// The first product: x [T, H] -> h [pairs, I].
GemmArgs first_product(const MlpArgs& a, const MlpWorkspace& w) {
  GemmArgs up{};
  up.weights = a.gate_up;
  up.global_scale = a.gate_up_global;
  up.bias = a.gate_up_bias;
  up.params = a.params;
  up.num_params = a.num_params;
  up.activation = a.activation;
  up.row_weight = a.weight_on_input ? a.weights : nullptr;
  up.row_scale = w.x_scale;
  up.x = a.x;
  up.sorted = w.y;
  up.positions = static_cast<int>(a.shape.tokens * a.shape.top_k);
  up.out = w.h;
  up.offsets = w.offsets;
  up.source = w.token_of;
  up.experts = static_cast<int>(a.shape.experts);
  up.outputs = static_cast<int>(a.shape.intermediate);
  up.k = static_cast<int>(a.shape.hidden);
  return up;
}

// The second: h [pairs, I] -> y [pairs, H], in the order of pairs.
GemmArgs second_product(const MlpArgs& a, const MlpWorkspace& w) {
  GemmArgs down{};
  down.weights = a.down;
  down.global_scale = a.down_global;
  down.bias = a.down_bias;
  down.row_scale = w.h_scale;
  down.x = w.h;
  down.sorted = is_fp8(a.format) ? static_cast<void*>(w.h8) : w.h;
  down.positions = static_cast<int>(a.shape.tokens * a.shape.top_k);
  down.out = w.y;
  down.offsets = w.offsets;
  down.target = w.pair_of;
  down.experts = static_cast<int>(a.shape.experts);
  down.outputs = static_cast<int>(a.shape.hidden);
  down.k = static_cast<int>(a.shape.intermediate);
  return down;
}

}  // namespace

std::vector<TacticInfo> tactics(const Family& family, Format format) {
  std::vector<TacticInfo> list;
  for (const Tactic* t : family.tactics) {
    if (const int bytes = t->smem_bytes(format)) list.push_back({t->name, bytes});
  }
  return list;
}

const char* default_tactic(const Family& family, Format format, const MlpShape& shape, bool gated) {
  return family.mlp_tactic(format, shape, gated)->name;
}

int64_t mlp_workspace_bytes(Format format, const MlpShape& shape) {
  return MlpWorkspace(nullptr, format, shape).bytes;
}

int64_t grouped_workspace_bytes(Format format, const GroupedShape& shape) {
  return GroupedWorkspace(nullptr, format, shape).bytes;
}

std::string moe_mlp(const Family& family, const MlpArgs& a, const std::string& name,
                    void* workspace, cudaStream_t stream) {
  const MlpShape& s = a.shape;
  if (s.tokens == 0) return "";
  const Tactic* tactic = name.empty() ? family.mlp_tactic(a.format, s, is_gated(a.activation))
                                      : find(family, a.format, name);
  if (!tactic)
    return "tactic must be one of " + names(family, a.format, false) + ", got '" + name + "'";
  Launch launch{a.format, a.dtype, Epilogue::kPlain, 0, stream};
  if (is_gated(a.activation)) launch.epilogue = Epilogue::kGated;
  if (a.activation == Activation::kSwiglu) launch.epilogue = Epilogue::kSwiglu;
  const std::string complaint = count_multiprocessors(&launch.multiprocessors);
  if (!complaint.empty()) return complaint;
  const MlpWorkspace w(workspace, a.format, s);
  const GemmArgs up = first_product(a, w);
  GemmArgs down = second_product(a, w);

  if (tactic->run_mlp) {
    const std::string obstacle = tactic->obstacle(s);
    if (!obstacle.empty()) return "tactic '" + name + "' " + obstacle + "; take another, or ''";
    down.out = a.out;
    const FusedArgs fused{up,
                          down,
                          a.expert_ids,
                          a.expert_offset,
                          a.weights,
                          static_cast<int>(s.tokens),
                          static_cast<int>(s.top_k),
                          a.weight_on_input};
    const cudaError_t error = tactic->run_mlp(fused, launch);
    return error == cudaSuccess ? "" : failed(tactic->name, error);
  }

  SortArgs sort{};
  sort.expert_ids = a.expert_ids;
  sort.expert_offset = a.expert_offset;
  sort.pairs = up.positions;
  sort.top_k = static_cast<int>(s.top_k);
  sort.experts = up.experts;
  sort.offsets = w.offsets;
  sort.token_of = w.token_of;
  sort.pair_of = w.pair_of;
  sort.position_of = w.position_of;
  sort.counts = w.counts;
  cudaError_t error = sort_pairs(sort, stream);
  if (error != cudaSuccess) return failed("sort_pairs", error);

  QuantizeArgs quantize{};
  quantize.fp16 = a.dtype == Dtype::kFp16;
  if (is_fp8(a.format)) {
    quantize.x = a.x;
    quantize.rows = static_cast<int>(s.tokens);
    quantize.k = static_cast<int>(s.hidden);
    quantize.position_of = w.position_of;
    quantize.copies = sort.top_k;
    quantize.out = w.y;
    quantize.scale = w.x_scale;
    error = family.quantize_rows(quantize, stream);
    if (error != cudaSuccess) return failed("quantize_rows of x", error);
  } else if (tactic->reads_sorted) {
    error = gather_rows(a.x, w.position_of, static_cast<int>(s.tokens), sort.top_k, s.hidden * 2,
                        w.y, stream);
    if (error != cudaSuccess) return failed("gather_rows", error);
  }
  error = tactic->run(up, launch);
  if (error != cudaSuccess) return failed("first product", error);

  if (is_fp8(a.format)) {
    quantize.x = w.h;
    quantize.rows = sort.pairs;
    quantize.k = static_cast<int>(s.intermediate);
    quantize.end = w.offsets + s.experts;
    quantize.position_of = nullptr;
    quantize.out = w.h8;
    quantize.scale = w.h_scale;
    error = family.quantize_rows(quantize, stream);
    if (error != cudaSuccess) return failed("quantize_rows of h", error);
  }
  launch.epilogue = Epilogue::kStore;
  error = tactic->run(down, launch);
  if (error != cudaSuccess) return failed("second product", error);

  CombineArgs combine{};
  combine.y = w.y;
  combine.weights = a.weight_on_input ? nullptr : a.weights;
  combine.expert_ids = a.expert_ids;
  combine.expert_offset = a.expert_offset;
  combine.out = a.out;
  combine.tokens = static_cast<int>(s.tokens);
  combine.top_k = sort.top_k;
  combine.hidden = down.outputs;
  combine.experts = sort.experts;
  combine.fp16 = a.dtype == Dtype::kFp16;
  error = cuda::combine(combine, stream);
  return error == cudaSuccess ? "" : failed("combine", error);
}

std::string grouped_matmul(const Family& family, const GroupedArgs& a, const std::string& name,
                           void* workspace, cudaStream_t stream) {
  const GroupedShape& s = a.shape;
  if (s.rows == 0) return "";
  const Tactic* tactic = name.empty() ? family.product_tactic(a.format, s.rows, s.experts)
                                      : find(family, a.format, name);
  if (!tactic || !tactic->run) {
    return "tactic of one product must be one of " + names(family, a.format, true) + ", got '" +
           name + "'";
  }
  Launch launch{a.format, a.dtype, Epilogue::kStore, 0, stream};
  const std::string complaint = count_multiprocessors(&launch.multiprocessors);
  if (!complaint.empty()) return complaint;

  const GroupedWorkspace w(workspace, a.format, s);

  GroupArgs group{};
  group.group_sizes = a.group_sizes;
  group.group_offset = a.group_offset;
  group.groups = static_cast<int>(s.groups);
  group.experts = static_cast<int>(s.experts);
  group.rows = static_cast<int>(s.rows);
  group.offsets = w.offsets;
  cudaError_t error = group_offsets(group, stream);
  if (error != cudaSuccess) return failed("group_offsets", error);
  error = clear_other_rows(group.offsets, group.experts, a.out, group.rows, s.n * 2, stream);
  if (error != cudaSuccess) return failed("clear_other_rows", error);

  if (is_fp8(a.format)) {
    QuantizeArgs quantize{};
    quantize.x = a.x;
    quantize.fp16 = a.dtype == Dtype::kFp16;
    quantize.rows = group.rows;
    quantize.k = static_cast<int>(s.k);
    quantize.out = w.x8;
    quantize.scale = w.x_scale;
    error = family.quantize_rows(quantize, stream);
    if (error != cudaSuccess) return failed("quantize_rows", error);
  }
  GemmArgs product{};
  product.weights = a.w;
  product.global_scale = a.w_global;
  product.bias = a.bias;
  product.row_scale = w.x_scale;
  product.x = a.x;
  product.sorted = is_fp8(a.format) ? w.x8 : a.x;
  product.positions = group.rows;
  product.out = a.out;
  product.offsets = group.offsets;
  product.experts = group.experts;
  product.outputs = static_cast<int>(s.n);
  product.k = static_cast<int>(s.k);
  error = tactic->run(product, launch);
  return error == cudaSuccess ? "" : failed("grouped product", error);
}

}  // namespace jaxmoe::cuda
