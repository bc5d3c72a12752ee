// The contract of the Blackwell libraries: how weights lie in memory, and the exact arithmetic by
// which activations become FP4 or FP8. A quantisation-aware oracle does what stands here.
//
// Formats.  kNvfp4: NVFP4 weights x NVFP4 activations (W4A4): e2m1 elements, an e4m3 scale for
// every
//           16 along K, float32 scales per matrix and per row of activations.
//           kMxfp4: MXFP4 weights x MXFP8 activations (W4A8): e2m1 and e4m3 elements, an e8m0 scale
//           (2^(byte - 127)) for every 32 along K.
//
// Weights of one expert, W[N, K], are one block of `matrix_bytes`:
//
//   elements  [N][K / 2] bytes, the even K in the low nibble; padded to a multiple of 128 bytes
//   scales    `scale_bytes(N, K)`: the scale of row n, block b lies at `scale_index(n, b, K)`.
//             Rows are padded to 128 and blocks to 4, and what is padded is zero.
//
// `gate_up` is [gate; up], N = 2 I rows (I for an activation that is not gated) and K = H; `down`
// has N = H rows and K = I. TMA asks for rows of 16 bytes, and of 32 where it spreads FP4 over
// bytes (MXFP4 x MXFP8): K is a multiple of `k_multiple(format)`, N of 8.
//
// Quantisation of a row v[0 .. K) of float32: x of a token (times its weight if the weight is on
// the input), or h = activation(...) of a pair of token and expert. All operations are float32,
// each rounded once to nearest even; `/` is a correctly rounded division.
//
//   kNvfp4  amax = max |v[i]|;  g = input_scale if it is given, else amax / 2688 (= 448 * 6), or 1
//           if that is 0
//           for each block of 16: a = max |v[i]|;  s = e4m3(a / (6 * g))     (at most 448)
//           code[i] = e2m1(v[i] / (s * g)), or 0 if s is 0                   (at most 6)
//   kMxfp4  g = input_scale if it is given (v[i] = v[i] / input_scale first), else 1
//           for each block of 32: a = max |v[i]|
//           s = 2^clamp(floor(log2(a)) - 8, -127, 127), or 2^-127 if a is 0
//           code[i] = e4m3(v[i] / s)                                         (at most 448)
//
//   e4m3 and e2m1 round to nearest, ties to even, and saturate. A row that holds an infinity or a
//   NaN gets g = NaN and codes 0, so that its results are NaN and no other row's are.
//
// Products.  D[row, n] = bf16(sum over k of (code * s)(row, k) * (element * scale)(n, k)), summed
// in
//   float32. Then, in float32 and without another rounding in between:
//     u = D1 * (gate_up_global[e] * g_row) + gate_up_bias[e];  h = activation(gate, up) of u
//     y = D2 * (down_global[e] * g_row) + down_bias[e]
//     out[token] = bf16(sum over the token's choices, in order, of weight * y)
//   where D2 is the product of h, quantised as above with its own g_row for each pair.
#ifndef JAXMOE_CSRC_BLACKWELL_LAYOUT_H_
#define JAXMOE_CSRC_BLACKWELL_LAYOUT_H_

#include <cstdint>

#ifdef __CUDACC__
#define JAXMOE_HOST_DEVICE __host__ __device__
#else
#define JAXMOE_HOST_DEVICE
#endif

namespace jaxmoe::blackwell {

enum class Format { kNvfp4, kMxfp4 };

inline constexpr int kScaleRows = 128;  // of the scales' tiles, which hold 4 blocks of each row
inline constexpr int kScaleBlocks = 4;
inline constexpr int kScaleTileBytes = kScaleRows * kScaleBlocks;

JAXMOE_HOST_DEVICE constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
JAXMOE_HOST_DEVICE constexpr int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

JAXMOE_HOST_DEVICE constexpr int block_size(Format format) {
  return format == Format::kNvfp4 ? 16 : 32;
}
JAXMOE_HOST_DEVICE constexpr int k_multiple(Format format) {
  return format == Format::kNvfp4 ? 32 : 64;
}
// Tiles of scales along K.
JAXMOE_HOST_DEVICE constexpr int64_t scale_tiles(Format format, int64_t k) {
  return divide_up(k, block_size(format) * kScaleBlocks);
}
// Where the scale of a row and a block lies, in a matrix with `tiles` tiles of scales along K.
JAXMOE_HOST_DEVICE constexpr int64_t scale_index(int64_t row, int64_t block, int64_t tiles) {
  return (row / kScaleRows * tiles + block / kScaleBlocks) * kScaleTileBytes + row % 32 * 16 +
         row % kScaleRows / 32 * 4 + block % kScaleBlocks;
}
JAXMOE_HOST_DEVICE constexpr int64_t scale_bytes(Format format, int64_t rows, int64_t k) {
  return divide_up(rows, kScaleRows) * scale_tiles(format, k) * kScaleTileBytes;
}
JAXMOE_HOST_DEVICE constexpr int64_t element_bytes(int64_t rows, int64_t k) {
  return round_up(rows * (k / 2), 128);
}
JAXMOE_HOST_DEVICE constexpr int64_t matrix_bytes(Format format, int64_t rows, int64_t k) {
  return element_bytes(rows, k) + scale_bytes(format, rows, k);
}

// K of a product as the kernels see it: spread FP4 comes in spans of 128 elements, so MXFP8
// activations are padded with zeros to that. (What weights have behind the end of a row is then
// multiplied by zeros.)
JAXMOE_HOST_DEVICE constexpr int64_t padded_k(Format format, int64_t k) {
  return format == Format::kNvfp4 ? k : round_up(k, 128);
}
// Bytes of the elements of a row of activations.
JAXMOE_HOST_DEVICE constexpr int64_t row_bytes(Format format, int64_t k) {
  return format == Format::kNvfp4 ? k / 2 : padded_k(format, k);
}

// Activations of all experts lie one after the other, sorted; the scales of each expert start at a
// row that is a multiple of 128, after those of `position` rows and `expert` experts.
JAXMOE_HOST_DEVICE constexpr int64_t first_scale_row(int64_t position, int64_t expert) {
  return round_up(position + expert * (kScaleRows - 1), kScaleRows);
}

}  // namespace jaxmoe::blackwell

#endif  // JAXMOE_CSRC_BLACKWELL_LAYOUT_H_
