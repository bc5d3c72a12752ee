#include "cpu/routing.h"

#include <algorithm>

#include "cpu/layout.h"

namespace jaxmoe::cpu {
namespace {

// Decoding a panel costs about as much as multiplying it by so many rows.
constexpr int64_t kDecodeRows = 6;

}  // namespace

Tactic SegmentRule::choose(int64_t rows) const {
  if (tactic != Tactic::kAuto) return tactic;
  return rows <= max_integer_rows  ? Tactic::kInteger
         : rows <= max_stream_rows ? Tactic::kStream
                                   : Tactic::kTiles;
}

RowForm SegmentRule::form(Tactic chosen) const {
  return chosen == Tactic::kInteger  ? integer_form
         : chosen == Tactic::kStream ? stream_form
                                     : tiles_form;
}

RowForm SegmentRule::form_of_many() const { return form(choose(kAnyRows)); }

int64_t SegmentRule::row_bytes(RowForm rows) const {
  switch (rows) {
    case RowForm::kF32:
      return hidden_columns * 4;
    case RowForm::kFixed:
      return round_up(hidden_columns / FixedBlock::kValues * int64_t{sizeof(FixedBlock)}, 64);
    case RowForm::kInt8:
      return round_up(hidden_columns / FixedBlock::kValues * int64_t{sizeof(Int8Block)}, 64);
    case RowForm::kTiles:
      break;
  }
  return hidden_columns * 2 * planes;
}

int64_t SegmentRule::hidden_bytes(const Segment& segment) const {
  const int64_t rows =
      segment.form == RowForm::kTiles ? round_up(segment.rows, segment.tile_rows) : segment.rows;
  return rows * row_bytes(segment.form);
}

int64_t SegmentRule::hidden_bytes_bound(int64_t rows, int64_t experts) const {
  const bool any = tactic == Tactic::kAuto;
  const RowForm many = form_of_many();
  const int64_t bytes = row_bytes(many);
  int64_t bound = rows * bytes;
  // What experts with few rows take more in their own forms.
  const auto add = [&](RowForm own, int64_t few) {
    bound += std::min(rows, experts * few) * std::max<int64_t>(row_bytes(own) - bytes, 0);
  };
  if (any) {
    add(integer_form, max_integer_rows);
    if (max_stream_rows > max_integer_rows) add(stream_form, max_stream_rows);
  }
  // A partial tile for each expert with enough rows for tiles.
  const int64_t least = any ? int64_t{std::max(max_integer_rows, max_stream_rows)} + 1 : 1;
  if (many == RowForm::kTiles && whole_tiles)
    bound += std::min(experts, rows / least) * (TileRows::kTileRows - 1) * bytes;
  return bound;
}

SegmentRule segment_rule(const Kernels& kernels, Compute compute, Dtype dtype, bool fixed,
                         Tactic tactic) {
  SegmentRule rule;
  rule.tactic = tactic;
  if (compute == Compute::kW4a8) {
    rule.integer_form = RowForm::kInt8;
    rule.max_integer_rows = kernels.max_int8_rows;
    rule.round_int8 = true;
  } else if (fixed && dtype == Dtype::kBf16) {
    rule.max_integer_rows = kernels.max_fixed_rows;
  }
  rule.max_stream_rows = kernels.max_stream_rows;
  if (kernels.stream_tiles[0]) rule.stream_form = RowForm::kTiles;
  if (kernels.panel_tiles[0]) rule.tiles_form = RowForm::kTiles;
  rule.whole_tiles = kernels.whole_tiles;
  // 8-bit integers times a power of two are exact in bf16.
  rule.planes = compute == Compute::kW4a8 ? 1 : tile_planes(dtype);
  return rule;
}

int64_t append_segments(const SegmentRule& rule, int64_t expert, int64_t first_row, int64_t rows,
                        int64_t hidden_offset, std::vector<Segment>& segments) {
  if (rows == 0) return hidden_offset;
  const Tactic chosen = rule.choose(rows);
  const RowForm form = rule.form(chosen);
  const bool streamed = chosen == Tactic::kStream;
  const int64_t max_rows = form == RowForm::kF32 ? rule.max_rows_f32 : rule.max_rows;
  const int64_t count = ceil_div(rows, max_rows);
  // Equal shares in whole tiles, so that only an expert's last tile is partial.
  const int64_t share = std::min(max_rows, round_up(ceil_div(rows, count), TileRows::kTileRows));
  for (int64_t done = 0; done < rows; done += share) {
    const int here = static_cast<int>(std::min(share, rows - done));
    const int tile_rows = rule.whole_tiles && !streamed ? TileRows::kTileRows : here;
    segments.push_back({expert, first_row + done, here, form, streamed, tile_rows, hidden_offset});
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
