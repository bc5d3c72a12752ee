#include "cpu/moe_mlp.h"

#include <algorithm>
#include <cstring>

#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "cpu/operand.h"
#include "cpu/routing.h"

namespace jaxmoe::cpu {
namespace {

// A chunk's activations stay below glibc's largest mmap threshold (32 MiB): beyond it every call
// would get fresh pages and pay for faulting them in. But a chunk has enough tokens to pay for
// reading the weights once more.
constexpr int64_t kWorkspaceTarget = int64_t{31} << 20;
constexpr int64_t kMinChunkTokens = 512;
constexpr int64_t kMaxChunkTokens = 2048;
// Rows of a segment: few enough that operand and products stay in L2.
constexpr int64_t kSegmentBytes = int64_t{1} << 20;
constexpr int kMaxSegmentRows = 256;
constexpr int kMinSegmentRows = 48;
// Partial sums of a column group, per thread: in L2.
constexpr int64_t kSumBytes = int64_t{2} << 20;
// Below this many multiplications, waking helpers costs more than they bring.
constexpr int64_t kMinParallelWork = int64_t{1} << 18;

SegmentRule rule_for(const Kernels& kernels, Compute compute, Dtype dtype, Tactic tactic,
                     const MoeMlpShape& shape) {
  const int64_t row_bytes = round_up(shape.hidden_size, kSuperblockK) * 4;
  const int64_t fitting =
      kSegmentBytes / std::max<int64_t>(row_bytes, 1) / TileRows::kTileRows * TileRows::kTileRows;
  SegmentRule rule = segment_rule(kernels, compute, dtype, /*fixed=*/true, tactic);
  rule.max_rows_f32 =
      static_cast<int>(std::clamp<int64_t>(fitting, kMinSegmentRows, kMaxSegmentRows));
  rule.max_rows = kMaxSegmentRows;
  rule.hidden_columns = round_up(shape.intermediate_size, kSuperblockK);
  return rule;
}

int64_t chunk_tokens(const SegmentRule& rule, const MoeMlpShape& shape) {
  const int64_t row_bytes = rule.row_bytes(rule.form_of_many());
  const int64_t token_bytes = std::max<int64_t>(row_bytes * shape.top_k, 1);
  // The workspace has room for every tactic, and must not grow for one that is hardly ever asked
  // for.
  const int64_t least = rule.tactic == Tactic::kAuto ? kMinChunkTokens : 1;
  const int64_t limit = std::clamp(kWorkspaceTarget / token_bytes, least, kMaxChunkTokens);
  const int64_t chunks = std::max<int64_t>(ceil_div(shape.tokens, limit), 1);
  return ceil_div(shape.tokens, chunks);
}

int64_t workspace_bytes(const SegmentRule& rule, const MoeMlpShape& shape) {
  return rule.hidden_bytes_bound(chunk_tokens(rule, shape) * shape.top_k, shape.num_experts) + 64;
}

class MoeMlpJob : public Job {
 public:
  MoeMlpJob(const MoeMlpArgs& args, const Kernels& kernels, int threads)
      : Job(phase_tasks(args, kernels, threads)),
        args_(args),
        kernels_(kernels),
        gated_(activation_info(args.activation).gated),
        rule_(rule_for(kernels, args.compute, args.dtype, args.tactic, args.shape)),
        chunk_(chunk_tokens(rule_, args.shape)),
        gate_up_tasks_(gate_up_tasks(chunk_, threads)),
        group_panels_(group_panels(args.shape, chunk_, threads)),
        gate_up_(args.format, args.shape.intermediate_size, args.shape.hidden_size, gated_),
        down_(args.format, args.shape.hidden_size, args.shape.intermediate_size, false) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(args.workspace);
    hidden_ = reinterpret_cast<uint8_t*>((address + 63) & ~uintptr_t{63});
  }

  void enter() const override {
    if (kernels_.enter) kernels_.enter();
  }
  void leave() const override {
    if (kernels_.leave) kernels_.leave();
  }

  void run(int phase, int64_t task, Scratch& scratch) override {
    const int64_t first_token = phase / kPhases * chunk_;
    const int64_t tokens = std::min(chunk_, args_.shape.tokens - first_token);
    switch (phase % kPhases) {
      case 0:
        return sort(first_token, tokens);
      case 1:
        return schedule_.for_each(task, gate_up_tasks_,
                                  [&](int64_t segment, int64_t begin, int64_t end) {
                                    gate_up(first_token, segments_[segment], begin, end, scratch);
                                  });
      case 2:
        return down(first_token, tokens, task * group_panels_,
                    std::min(down_.panels, (task + 1) * group_panels_), scratch);
    }
  }

 private:
  static constexpr int kPhases = 3;

  // Tasks per thread: few long runs where weights are streamed once, more where work is uneven.
  static int64_t gate_up_tasks(int64_t chunk, int threads) {
    return threads == 1 ? 1 : int64_t{threads} * (chunk <= 16 ? 4 : 16);
  }
  static int64_t group_panels(const MoeMlpShape& shape, int64_t chunk, int threads) {
    const int64_t panels = ceil_div(shape.hidden_size, kPanelLanes);
    const int64_t fits = kSumBytes / (chunk * kPanelLanes * 4);
    return std::clamp<int64_t>(std::min<int64_t>(fits, ceil_div(panels, int64_t{threads} * 4)), 1,
                               panels);
  }
  static std::vector<int64_t> phase_tasks(const MoeMlpArgs& args, const Kernels& kernels,
                                          int threads) {
    const MoeMlpShape& shape = args.shape;
    const SegmentRule rule = rule_for(kernels, args.compute, args.dtype, args.tactic, shape);
    const int64_t chunk = chunk_tokens(rule, shape);
    const int64_t groups =
        ceil_div(ceil_div(shape.hidden_size, kPanelLanes), group_panels(shape, chunk, threads));
    std::vector<int64_t> tasks;
    for (int64_t first = 0; first < shape.tokens; first += chunk) {
      tasks.insert(tasks.end(), {1, gate_up_tasks(chunk, threads), groups});
    }
    return tasks;
  }

  void sort(int64_t first_token, int64_t tokens) {
    const MoeMlpShape& shape = args_.shape;
    pairs_.sort(args_.expert_ids + first_token * shape.top_k,
                args_.weights + first_token * shape.top_k, tokens, shape.top_k, args_.expert_offset,
                shape.num_experts);
    segments_.clear();
    int64_t offset = 0;
    for (int64_t expert = 0; expert < shape.num_experts; ++expert) {
      const int64_t begin = pairs_.expert_begin[expert];
      const int64_t rows = pairs_.expert_begin[expert + 1] - begin;
      offset = append_segments(rule_, expert, begin, rows, offset, segments_);
    }
    schedule_.build(segments_, gate_up_.panels);
  }

  TileRows hidden_tiles(const Segment& segment) const {
    return {hidden_ + segment.hidden_offset, down_.padded_k() / TileRows::kTileK, rule_.planes,
            segment.tile_rows};
  }
  // From block `first` of row `row` on.
  template <class Block>
  Block* hidden_blocks(const Segment& segment, int row = 0, int64_t first = 0) const {
    return reinterpret_cast<Block*>(hidden_ + segment.hidden_offset) + row * blocks_per_row() +
           first;
  }
  int64_t blocks_per_row() const { return down_.padded_k() / FixedBlock::kValues; }
  float* hidden_rows(const Segment& segment) const {
    return reinterpret_cast<float*>(hidden_ + segment.hidden_offset);
  }

  void gate_up(int64_t first_token, const Segment& segment, int64_t begin, int64_t end,
               Scratch& scratch) const {
    const MoeMlpShape& shape = args_.shape;
    const Matrix x = {args_.x, args_.dtype, shape.hidden_size};
    const Operand a = gather(kernels_, rule_, segment, x, first_token,
                             pairs_.tokens.data() + segment.first_row, scratch);
    float* c = product_buffer(segment.rows, scratch);
    float bias[kPanelLanes] = {};
    ActivationCall call = {};
    call.activation = args_.activation;
    call.product_scale =
        args_.gate_up_global[segment.expert] * kProductExponent[static_cast<int>(args_.format)];
    call.row_scale = args_.weight_on_input ? pairs_.weights.data() + segment.first_row : nullptr;
    call.bias = bias;
    for (int p = 0; p < activation_info(args_.activation).num_params; ++p) {
      call.params[p] = args_.activation_params[p * shape.num_experts + segment.expert];
    }
    const uint8_t* packed = args_.gate_up + segment.expert * gate_up_.expert_bytes;
    for (int64_t panel = begin; panel < end; ++panel) {
      if (args_.gate_up_bias) lane_biases(segment.expert, panel, bias);
      multiply_panel(kernels_, args_.format, packed + panel * gate_up_.panel_bytes, gate_up_, a,
                     segment.rows, c, scratch);
      kernels_.activate(call, c, segment.rows);
      store_hidden(segment, panel, c);
    }
    if (end == gate_up_.panels) pad_hidden(segment);
  }

  // By linearity the weight of an input is applied to its product, in f32.
  void lane_biases(int64_t expert, int64_t panel, float* lanes) const {
    const int64_t size = args_.shape.intermediate_size;
    const int width = lanes_per_panel();
    const float* gate = args_.gate_up_bias + expert * size * (gated_ ? 2 : 1);
    for (int lane = 0; lane < width; ++lane) {
      const int64_t row = panel * width + lane;
      lanes[lane] = row < size ? gate[row] : 0.0f;
      if (gated_) lanes[width + lane] = row < size ? gate[size + row] : 0.0f;
    }
  }

  int lanes_per_panel() const { return gated_ ? kPanelLanes / 2 : kPanelLanes; }

  void store_hidden(const Segment& segment, int64_t panel, float* c) const {
    const int width = lanes_per_panel();
    const int64_t column = panel * width, block = column / FixedBlock::kValues;
    const bool round = rule_.round_int8 && segment.form != RowForm::kInt8;
    for (int r = 0; r < segment.rows; ++r, c += kPanelLanes) {
      if (round) kernels_.round_int8(c, width);
      switch (segment.form) {
        case RowForm::kF32:
          std::memcpy(hidden_rows(segment) + r * down_.padded_k() + column, c,
                      width * sizeof(float));
          break;
        case RowForm::kFixed:
          kernels_.pack_fixed(c, width, hidden_blocks<FixedBlock>(segment, r, block));
          break;
        case RowForm::kInt8:
          kernels_.pack_int8(c, width, hidden_blocks<Int8Block>(segment, r, block));
          break;
        case RowForm::kTiles:
          kernels_.pack_tile_f32(c, width, hidden_tiles(segment), r, column);
          break;
      }
    }
  }

  void pad_hidden(const Segment& segment) const {
    const int64_t written = gate_up_.panels * lanes_per_panel();
    switch (segment.form) {
      case RowForm::kF32:
        for (int r = 0; r < segment.rows; ++r) {
          float* row = hidden_rows(segment) + r * down_.padded_k();
          std::fill(row + written, row + down_.padded_k(), 0.0f);
        }
        return;
      case RowForm::kFixed:
        return pad_blocks<FixedBlock>(segment, written / FixedBlock::kValues);
      case RowForm::kInt8:
        return pad_blocks<Int8Block>(segment, written / FixedBlock::kValues);
      case RowForm::kTiles:
        return zero_tile_padding(hidden_tiles(segment), segment.rows, written);
    }
  }

  template <class Block>
  void pad_blocks(const Segment& segment, int64_t written) const {
    for (int r = 0; r < segment.rows; ++r) {
      std::fill(hidden_blocks<Block>(segment, r, written), hidden_blocks<Block>(segment, r + 1),
                Block{});
    }
  }

  void down(int64_t first_token, int64_t tokens, int64_t begin, int64_t end,
            Scratch& scratch) const {
    const int64_t stride = (end - begin) * kPanelLanes;
    float* sums = scratch.get<float>(Scratch::kOutput, tokens * stride);
    std::fill(sums, sums + tokens * stride, 0.0f);
    for (const Segment& segment : segments_)
      add_segment(segment, begin, end, sums, stride, scratch);
    write_out(first_token, tokens, begin * kPanelLanes, sums, stride);
  }

  Operand hidden_operand(const Segment& segment, Scratch& scratch) const {
    if (segment.form == RowForm::kF32) {
      return dense_rows(hidden_rows(segment), down_.padded_k(), segment, scratch);
    }
    Operand a;
    a.form = segment.form;
    a.streamed = segment.streamed;
    a.fixed = {hidden_blocks<FixedBlock>(segment), blocks_per_row()};
    a.int8 = {hidden_blocks<Int8Block>(segment), blocks_per_row()};
    a.tiles = hidden_tiles(segment);
    return a;
  }

  void add_segment(const Segment& segment, int64_t begin, int64_t end, float* sums, int64_t stride,
                   Scratch& scratch) const {
    const Operand a = hidden_operand(segment, scratch);
    float* c = product_buffer(segment.rows, scratch);
    float bias[kPanelLanes] = {};
    const float* weights = pairs_.weights.data() + segment.first_row;
    if (args_.weight_on_input) {
      float* ones = scratch.get<float>(Scratch::kOnes, segment.rows);
      std::fill(ones, ones + segment.rows, 1.0f);
      weights = ones;
    }
    CombineCall call = {};
    call.product_scale =
        args_.down_global[segment.expert] * kProductExponent[static_cast<int>(args_.format)];
    call.bias = bias;
    call.tokens = pairs_.tokens.data() + segment.first_row;
    call.weights = weights;
    call.stride = stride;
    const uint8_t* packed = args_.down + segment.expert * down_.expert_bytes;
    for (int64_t panel = begin; panel < end; ++panel) {
      if (args_.down_bias) {
        for (int lane = 0; lane < kPanelLanes; ++lane) {
          const int64_t row = panel * kPanelLanes + lane;
          const int64_t size = args_.shape.hidden_size;
          bias[lane] = row < size ? args_.down_bias[segment.expert * size + row] : 0.0f;
        }
      }
      multiply_panel(kernels_, args_.format, packed + panel * down_.panel_bytes, down_, a,
                     segment.rows, c, scratch);
      call.sums = sums + (panel - begin) * kPanelLanes;
      kernels_.combine(call, c, segment.rows);
    }
  }

  void write_out(int64_t first_token, int64_t tokens, int64_t column, const float* sums,
                 int64_t stride) const {
    const int64_t size = args_.shape.hidden_size;
    const int64_t count = std::min(stride, size - column);
    for (int64_t t = 0; t < tokens; ++t) {
      const int64_t offset = (first_token + t) * size + column;
      if (args_.dtype == Dtype::kF32) {
        std::memcpy(static_cast<float*>(args_.out) + offset, sums + t * stride,
                    count * sizeof(float));
      } else {
        kernels_.narrow(sums + t * stride, static_cast<uint16_t*>(args_.out) + offset, count);
      }
    }
  }

  const MoeMlpArgs args_;
  const Kernels& kernels_;
  const bool gated_;
  const SegmentRule rule_;
  const int64_t chunk_;
  const int64_t gate_up_tasks_;
  const int64_t group_panels_;
  const PanelGeometry gate_up_, down_;
  uint8_t* hidden_;

  // Written by a chunk's sort, read by its other phases.
  SortedPairs pairs_;
  std::vector<Segment> segments_;
  UnitSchedule schedule_;
};

}  // namespace

int64_t gate_up_bytes(Format format, Activation activation, const MoeMlpShape& shape) {
  const bool gated = activation_info(activation).gated;
  return PanelGeometry(format, shape.intermediate_size, shape.hidden_size, gated).expert_bytes;
}

int64_t down_bytes(Format format, const MoeMlpShape& shape) {
  return PanelGeometry(format, shape.hidden_size, shape.intermediate_size, false).expert_bytes;
}

int64_t moe_mlp_workspace_bytes(const Kernels& kernels, Compute compute, Dtype dtype,
                                const MoeMlpShape& shape) {
  const auto bytes = [&](Tactic tactic) {
    return workspace_bytes(rule_for(kernels, compute, dtype, tactic, shape), shape);
  };
  int64_t most = bytes(Tactic::kAuto);
  for (const Tactic tactic : named_tactics(kernels, compute)) {
    most = std::max(most, bytes(tactic));
  }
  return most;
}

bool moe_mlp(const MoeMlpArgs& args, Executor* executor) {
  const MoeMlpShape& shape = args.shape;
  if (shape.tokens == 0) return true;
  const int64_t work = shape.tokens * shape.top_k * shape.hidden_size * shape.intermediate_size;
  const int available = executor ? std::max(executor->num_threads(), 1) : 1;
  const int threads = work < kMinParallelWork ? 1 : available;
  return execute(std::make_shared<MoeMlpJob>(args, *args.kernels, threads), executor, threads);
}

}  // namespace jaxmoe::cpu
