// The left operand of a segment: rows of activations in the form that its kernel reads.
#ifndef JAXMOE_CSRC_CPU_OPERAND_H_
#define JAXMOE_CSRC_CPU_OPERAND_H_

#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "cpu/routing.h"
#include "cpu/threads.h"

namespace jaxmoe::cpu {

// A dense row-major [rows, columns] matrix in f32 or bf16.
struct Matrix {
  const void* data;
  Dtype dtype;
  int64_t columns;

  const void* row(int64_t index) const {
    const int64_t bytes = dtype == Dtype::kF32 ? 4 : 2;
    return static_cast<const uint8_t*>(data) + index * columns * bytes;
  }
};

// The member that `form` says is used. All are padded with zeros to whole superblocks.
struct Operand {
  RowForm form = RowForm::kF32;
  bool streamed = false;  // else the weights are decoded into L1; of kF32 and kTiles
  const float* const* rows = nullptr;
  FixedRows fixed;
  Int8Rows int8;
  TileRows tiles;
};

// Row i of the operand is row first + i of x, or row first + indices[i], for the rows of the
// segment. The result lives in `scratch` (slots kInput, kPointers and kWide), or in x itself.
Operand gather(const Kernels& kernels, const SegmentRule& rule, const Segment& segment,
               const Matrix& x, int64_t first, const int32_t* indices, Scratch& scratch);

// The segment's rows, dense in f32, `stride` floats apart.
Operand dense_rows(const float* data, int64_t stride, const Segment& segment, Scratch& scratch);

// Zeroes what the tile kernels read beyond [rows, columns): further columns, and the rest of the
// last tile.
void zero_tile_padding(const TileRows& tiles, int rows, int64_t columns);

// c = a * panel^T, unscaled.
void multiply_panel(const Kernels& kernels, Format format, const uint8_t* panel,
                    const PanelGeometry& geometry, const Operand& a, int rows, float* c,
                    Scratch& scratch);

// The product buffer for segments of `rows` rows.
float* product_buffer(int rows, Scratch& scratch);

}  // namespace jaxmoe::cpu

#endif  // JAXMOE_CSRC_CPU_OPERAND_H_
