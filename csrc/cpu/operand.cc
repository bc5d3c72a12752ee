#include "cpu/operand.h"

#include <algorithm>
#include <cstring>

namespace jaxmoe::cpu {

Operand dense_rows(const float* data, int64_t stride, const Segment& segment, Scratch& scratch) {
  const float** pointers = scratch.get<const float*>(Scratch::kPointers, segment.rows);
  for (int r = 0; r < segment.rows; ++r) pointers[r] = data + r * stride;
  Operand operand;
  operand.streamed = segment.streamed;
  operand.rows = pointers;
  return operand;
}

Operand gather(const Kernels& kernels, const SegmentRule& rule, const Segment& segment,
               const Matrix& x, int64_t first, const int32_t* indices, Scratch& scratch) {
  const int64_t padded = round_up(x.columns, kSuperblockK);
  const int rows = segment.rows;
  const auto source = [&](int r) { return x.row(first + (indices ? indices[r] : r)); };
  const auto wide = [&](int r, float* to) {
    if (x.dtype == Dtype::kF32) return static_cast<const float*>(source(r));
    kernels.widen(static_cast<const uint16_t*>(source(r)), to, x.columns);
    return static_cast<const float*>(to);
  };
  const auto rounded = [&](int r, float* to) {
    if (const float* values = wide(r, to); values != to) std::copy_n(values, x.columns, to);
    kernels.round_int8(to, x.columns);
    return static_cast<const float*>(to);
  };
  Operand operand;
  operand.form = segment.form;
  operand.streamed = segment.streamed;
  if (segment.form == RowForm::kTiles) {
    operand.tiles.planes = rule.planes;
    operand.tiles.k_blocks = padded / TileRows::kTileK;
    operand.tiles.tile_rows = segment.tile_rows;
    const int64_t bytes = round_up(rows, segment.tile_rows) * padded * 2 * operand.tiles.planes;
    operand.tiles.data = scratch.get<uint8_t>(Scratch::kInput, bytes);
    float* row = scratch.get<float>(Scratch::kWide, rule.round_int8 ? x.columns : 0);
    for (int r = 0; r < rows; ++r) {
      if (rule.round_int8) {
        kernels.pack_tile_f32(rounded(r, row), x.columns, operand.tiles, r, 0);
      } else if (x.dtype == Dtype::kBf16) {
        kernels.pack_tile_bf16(static_cast<const uint16_t*>(source(r)), x.columns, operand.tiles, r,
                               0);
      } else {
        kernels.pack_tile_f32(static_cast<const float*>(source(r)), x.columns, operand.tiles, r, 0);
      }
    }
    zero_tile_padding(operand.tiles, rows, x.columns);
    return operand;
  }
  const auto integers = [&](auto pack, auto zero) {
    using Block = decltype(zero);
    const int64_t used = x.columns / FixedBlock::kValues, blocks = padded / FixedBlock::kValues;
    Block* data = scratch.get<Block>(Scratch::kInput, rows * blocks);
    float* row = scratch.get<float>(Scratch::kWide, x.columns);
    for (int r = 0; r < rows; ++r) {
      pack(wide(r, row), x.columns, data + r * blocks);
      std::fill(data + r * blocks + used, data + (r + 1) * blocks, zero);
    }
    return BlockRows<Block>{data, blocks};
  };
  if (segment.form == RowForm::kFixed) {
    operand.fixed = integers(kernels.pack_fixed, FixedBlock{});
    return operand;
  }
  if (segment.form == RowForm::kInt8) {
    operand.int8 = integers(kernels.pack_int8, Int8Block{});
    return operand;
  }
  if (x.dtype == Dtype::kF32 && x.columns == padded && !rule.round_int8) {
    const float** pointers = scratch.get<const float*>(Scratch::kPointers, rows);
    for (int r = 0; r < rows; ++r) pointers[r] = static_cast<const float*>(source(r));
    operand.rows = pointers;
    return operand;
  }
  float* copy = scratch.get<float>(Scratch::kInput, rows * padded);
  for (int r = 0; r < rows; ++r) {
    float* row = copy + r * padded;
    if (rule.round_int8) {
      rounded(r, row);
    } else if (const float* values = wide(r, row); values != row) {
      std::memcpy(row, values, x.columns * sizeof(float));
    }
    std::fill(row + x.columns, row + padded, 0.0f);
  }
  return dense_rows(copy, padded, segment, scratch);
}

void zero_tile_padding(const TileRows& tiles, int rows, int64_t columns) {
  const int padded_rows = static_cast<int>(round_up(rows, tiles.tile_rows));
  const int64_t padded_columns = tiles.k_blocks * TileRows::kTileK;
  for (int r = 0; r < padded_rows; ++r) {
    for (int64_t k = r < rows ? columns : 0; k < padded_columns;) {
      const int64_t end = std::min(padded_columns, round_up(k + 1, TileRows::kTileK));
      for (int plane = 0; plane < tiles.planes; ++plane) {
        std::memset(tiles.at(r, k) + plane * tiles.plane_stride(), 0, (end - k) * 2);
      }
      k = end;
    }
  }
}

float* product_buffer(int rows, Scratch& scratch) {
  return scratch.get<float>(Scratch::kProduct, round_up(rows, TileRows::kTileRows) * kPanelLanes);
}

void multiply_panel(const Kernels& kernels, Format format, const uint8_t* panel,
                    const PanelGeometry& geometry, const Operand& a, int rows, float* c,
                    Scratch& scratch) {
  float* decoded = scratch.get<float>(Scratch::kWeights, Kernels::kDecodedFloats);
  const int index = static_cast<int>(format);
  switch (a.form) {
    case RowForm::kF32:
      return (a.streamed ? kernels.stream_f32 : kernels.panel_f32)[index](
          panel, geometry.superblocks, a.rows, rows, c, decoded);
    case RowForm::kFixed:
      return kernels.panel_fixed[index](panel, geometry.superblocks, a.fixed, rows, c);
    case RowForm::kInt8:
      return kernels.panel_int8[index](panel, geometry.superblocks, a.int8, rows, c);
    case RowForm::kTiles:
      return (a.streamed ? kernels.stream_tiles : kernels.panel_tiles)[index](
          panel, geometry.superblocks, a.tiles, rows, c, decoded);
  }
}

}  // namespace jaxmoe::cpu
