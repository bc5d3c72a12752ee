// The `sm90_fragment` layout of packed FP4 weights.
//
// A matrix W[N, K] of one expert is cut into strips of 64 rows, a strip into blocks of 64 elements
// of K; blocks lie in the order [strip][block], each contiguous:
//
//   elements  [4 warps][32 lanes][4 steps] dwords: what a lane multiplies in four wgmma (or
//   mma.sync)
//             steps of 16 along K, 8 elements a step in the bit order of dequantize.cuh
//   scales    [4 warps][8 rows][scales of a row][2: the row, the row + 8], one byte each
//
// Warp w of a plain matrix's strip s holds rows 64 s + 16 w + (0 ... 15). For a gated `gate_up` its
// rows 0 ... 7 are gate rows 32 s + 8 w + (0 ... 7) and its rows 8 ... 15 the up rows of the same
// numbers, so that one lane holds both factors of a value. N and K are padded with zeros.
#ifndef JAXMOE_CSRC_SM90_LAYOUT_H_
#define JAXMOE_CSRC_SM90_LAYOUT_H_

#include <cstdint>

namespace jaxmoe::sm90 {

enum class Format { kNvfp4, kMxfp4 };

inline constexpr int kStripRows = 64;
inline constexpr int kBlockK = 64;
inline constexpr int kElementBytes = kStripRows * kBlockK / 2;

constexpr int scales_per_row(Format format) { return format == Format::kNvfp4 ? 4 : 2; }
constexpr int scale_bytes(Format format) { return kStripRows * scales_per_row(format); }
constexpr int block_bytes(Format format) { return kElementBytes + scale_bytes(format); }

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
// Strips of a matrix whose product has `outputs` columns: a gated strip yields 32 of them.
constexpr int64_t num_strips(int64_t outputs, bool gated) {
  return divide_up(outputs, gated ? kStripRows / 2 : kStripRows);
}
constexpr int64_t num_blocks(int64_t k) { return divide_up(k, kBlockK); }
constexpr int64_t matrix_bytes(Format format, int64_t outputs, int64_t k, bool gated) {
  return num_strips(outputs, gated) * num_blocks(k) * block_bytes(format);
}

}  // namespace jaxmoe::sm90

#endif  // JAXMOE_CSRC_SM90_LAYOUT_H_
