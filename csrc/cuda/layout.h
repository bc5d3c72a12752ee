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
#ifndef JAXMOE_CSRC_CUDA_LAYOUT_H_
#define JAXMOE_CSRC_CUDA_LAYOUT_H_

#include <cstdint>

namespace jaxmoe::cuda {

// kMxfp4Fp8 is MXFP4 arranged for products with e4m3 activations, the `sm90_fragment_fp8` layout:
// strips as above, blocks of 128 elements of K:
//
//   elements  [2: rows g, rows g + 8][4 warps][32 lanes][4 steps of 32 along K] dwords
//   scales    [4 warps][8 rows][2: the row, the row + 8][4 steps], one byte each
//
// and after a strip's last block the exponents of its rows, [4 warps][8 rows][2], one byte each: a
// row's sums are multiplied by 2^(byte - 127). A block's scale relative to that fits into
// the exponent of e4m3 (dequantize.cuh).
enum class Format { kNvfp4, kMxfp4, kMxfp4Fp8 };
constexpr bool is_fp8(Format format) { return format == Format::kMxfp4Fp8; }

inline constexpr int kStripRows = 64;
inline constexpr int kBlockK = 64;  // of the layouts for 16-bit activations
inline constexpr int kElementBytes = kStripRows * kBlockK / 2;

constexpr int block_k(Format format) { return is_fp8(format) ? 2 * kBlockK : kBlockK; }
constexpr int element_bytes(Format format) { return kStripRows * block_k(format) / 2; }
constexpr int scales_per_row(Format format) { return format == Format::kMxfp4 ? 2 : 4; }
constexpr int scale_bytes(Format format) { return kStripRows * scales_per_row(format); }
constexpr int block_bytes(Format format) { return element_bytes(format) + scale_bytes(format); }

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
// Strips of a matrix whose product has `outputs` columns: a gated strip yields 32 of them.
constexpr int64_t num_strips(int64_t outputs, bool gated) {
  return divide_up(outputs, gated ? kStripRows / 2 : kStripRows);
}
constexpr int64_t num_blocks(int64_t k, Format format = Format::kNvfp4) {
  return divide_up(k, block_k(format));
}
// A strip's blocks, and the exponents of its rows.
constexpr int64_t strip_bytes(Format format, int64_t k) {
  return num_blocks(k, format) * block_bytes(format) + (is_fp8(format) ? kStripRows : 0);
}
constexpr int64_t matrix_bytes(Format format, int64_t outputs, int64_t k, bool gated) {
  return num_strips(outputs, gated) * strip_bytes(format, k);
}

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_CSRC_CUDA_LAYOUT_H_
