#include "cpu/routing.h"

#include <algorithm>

#include "cpu/layout.h"

namespace jaxmoe::cpu {
namespace {

// Decoding a panel costs about as much as multiplying it by so many rows.
constexpr int64_t kDecodeRows = 6;

}  // namespace

int64_t SegmentRule::hidden_bytes(const Segment& segment) const {
  switch (segment.form) {
    case RowForm::kF32:
      return segment.rows * hidden_columns * 4;
    case RowForm::kFixed:
      return round_up(
          segment.rows * hidden_columns / FixedBlock::kValues * int64_t{sizeof(FixedBlock)}, 64);
    case RowForm::kInt8:
      return round_up(
          segment.rows * hidden_columns / FixedBlock::kValues * int64_t{sizeof(Int8Block)}, 64);
    case RowForm::kTiles:
      break;
  }
  return round_up(segment.rows, segment.tile_rows) * hidden_columns * 2 * planes;
}

int64_t SegmentRule::hidden_row_bytes() const {
  if (max_integer_rows == kAnyRows) {  // which are Int8Blocks
    return round_up(hidden_columns / FixedBlock::kValues * int64_t{sizeof(Int8Block)}, 64);
  }
  return hidden_columns * (has_tiles ? 2 * planes : 4);
}

int64_t SegmentRule::hidden_bytes_bound(int64_t rows, int64_t experts) const {
  if (!has_tiles || max_integer_rows == kAnyRows) return rows * hidden_row_bytes();
  // Every row in tiles, one partial tile for each expert that has enough rows for them; and, for
  // experts with few rows, f32 (the larger of the other forms) instead.
  const int few = std::max(max_integer_rows, min_tile_rows - 1);
  const int64_t padded_rows =
      rows + std::min(experts, rows / (few + 1)) * (TileRows::kTileRows - 1);
  return padded_rows * hidden_columns * 2 * planes +
         std::min(rows, experts * few) * hidden_columns * 4;
}

SegmentRule segment_rule(const Kernels& kernels, Compute compute, Dtype dtype, bool fixed) {
  SegmentRule rule;
  rule.has_tiles = kernels.panel_tiles[0] != nullptr;
  if (compute == Compute::kW4a8) {
    rule.integers = RowForm::kInt8;
    rule.max_integer_rows = kernels.max_int8_rows;
    rule.round_int8 = true;
  } else {
    rule.max_integer_rows = fixed && dtype == Dtype::kBf16 ? kernels.max_fixed_rows : 0;
  }
  rule.min_tile_rows = kernels.min_tile_rows;
  rule.max_short_tile_rows = kernels.max_short_tile_rows;
  rule.planes = compute == Compute::kW4a8 ? 1 : tile_planes(dtype);
  return rule;
}

int64_t append_segments(const SegmentRule& rule, int64_t expert, int64_t first_row, int64_t rows,
                        int64_t hidden_offset, std::vector<Segment>& segments) {
  if (rows == 0) return hidden_offset;
  const RowForm form = rows <= rule.max_integer_rows                  ? rule.integers
                       : rule.has_tiles && rows >= rule.min_tile_rows ? RowForm::kTiles
                                                                      : RowForm::kF32;
  const int tile_rows =
      rows <= rule.max_short_tile_rows ? static_cast<int>(rows) : TileRows::kTileRows;
  const int64_t max_rows = form == RowForm::kF32 ? rule.max_rows_f32 : rule.max_rows;
  const int64_t count = ceil_div(rows, max_rows);
  // Equal shares in whole tiles, so that only an expert's last tile is partial.
  const int64_t share = std::min(max_rows, round_up(ceil_div(rows, count), TileRows::kTileRows));
  for (int64_t done = 0; done < rows; done += share) {
    const int here = static_cast<int>(std::min(share, rows - done));
    segments.push_back({expert, first_row + done, here, form, tile_rows, hidden_offset});
    hidden_offset += rule.hidden_bytes(segments.back());
  }
  return hidden_offset;
}

void SortedPairs::sort(const int32_t* expert_ids, const float* pair_weights, int64_t num_tokens,
                       int64_t top_k, int64_t expert_offset, int64_t num_experts) {
  const int64_t pairs = num_tokens * top_k;
  const auto local = [&](int64_t pair) {
    const int64_t expert = int64_t{expert_ids[pair]} - expert_offset;
    return expert >= 0 && expert < num_experts ? expert : -1;
  };
  expert_begin.assign(num_experts + 1, 0);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    if (const int64_t expert = local(pair); expert >= 0) ++expert_begin[expert + 1];
  }
  for (int64_t expert = 0; expert < num_experts; ++expert)
    expert_begin[expert + 1] += expert_begin[expert];
  tokens.resize(expert_begin.back());
  weights.resize(expert_begin.back());
  std::vector<int64_t> next(expert_begin.begin(), expert_begin.end() - 1);
  for (int64_t token = 0; token < num_tokens; ++token) {
    for (int64_t choice = 0; choice < top_k; ++choice) {
      const int64_t pair = token * top_k + choice;
      if (const int64_t expert = local(pair); expert >= 0) {
        tokens[next[expert]] = static_cast<int32_t>(token);
        weights[next[expert]++] = pair_weights[pair];
      }
    }
  }
}

void UnitSchedule::build(const std::vector<Segment>& segments, int64_t panels) {
  panels_ = panels;
  cost_begin_.assign(1, 0);
  for (const Segment& segment : segments) {
    cost_begin_.push_back(cost_begin_.back() + panels * (segment.rows + kDecodeRows));
  }
}

UnitSchedule::Position UnitSchedule::position(int64_t task, int64_t tasks) const {
  // 128-bit, for the product of a cost and a task number.
  const int64_t cost =
      static_cast<int64_t>(static_cast<__int128>(cost_begin_.back()) * task / tasks);
  const auto after = std::upper_bound(cost_begin_.begin(), cost_begin_.end(), cost);
  const int64_t segment = static_cast<int64_t>(after - cost_begin_.begin()) - 1;
  if (segment >= num_segments()) return {num_segments(), 0};
  const int64_t unit = (cost_begin_[segment + 1] - cost_begin_[segment]) / panels_;
  return {segment, ceil_div(cost - cost_begin_[segment], unit)};
}

}  // namespace jaxmoe::cpu
