// The table of kernels that a variant provides. Everything that depends on the instruction set
// stands behind it; the plans (moe_mlp.cc, grouped_matmul.cc) are plain C++.
//
// Products are handed over as c[row][32 lanes of a panel] in f32, without the expert's global scale
// and, for NVFP4, times 2^-8 (an e4m3 scale becomes a float by way of f16, whose exponent bias is 8
// larger): `product_scale` has both.
#ifndef JAXMOE_CSRC_CPU_KERNELS_H_
#define JAXMOE_CSRC_CPU_KERNELS_H_

#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/types.h"

namespace jaxmoe::cpu {

// Rows as the bf16 tile kernels read them: tiles of `tile_rows` rows x 32 k at 64 bytes a row,
// ordered by tile of rows, then plane, then k. Inside each 8 k the order is 0,4,1,5,2,6,3,7,
// because a shifted dword of codes yields the pairs (j, j + 4). The planes' sum is the value: one
// is bf16, two have 16 bits, three are all of f32.
struct TileRows {
  uint8_t* data = nullptr;
  int64_t k_blocks = 0;
  int planes = 1;
  int tile_rows = kTileRows;  // 16; or all rows, in the only tile

  inline __attribute__((always_inline)) uint8_t* at(int64_t row, int64_t k) const {
    // A tile with fewer rows is the only one.
    const int64_t tile = tile_rows == kTileRows ? row / kTileRows : 0;
    return data + (tile * planes * k_blocks + k / kTileK) * block_stride() +
           (row - tile * kTileRows) * kRowBytes + k % kTileK * 2;
  }
  inline __attribute__((always_inline)) int64_t block_stride() const {
    return int64_t{tile_rows} * kRowBytes;
  }
  inline __attribute__((always_inline)) int64_t plane_stride() const {
    return k_blocks * block_stride();
  }

  static constexpr int kTileRows = 16;
  static constexpr int kTileK = 32;
  static constexpr int kRowBytes = 64;
};

// Sixteen values as the integer kernels read them: 16-bit integers times one power of two, their
// upper and lower bytes apart, each byte with a sign. Inside each 8 the order is
// 0,2,4,6,1,3,5,7: the low nibbles of a dword of codes, then the high ones.
struct FixedBlock {
  int8_t high[16];
  int8_t low[16];
  float scale;
  int32_t
      correction;  // for weights w as unsigned bytes 2 w + 12: -12 times the sum of the integers

  static constexpr int kValues = 16;
};

// Sixteen values as compute="w4a8" multiplies them, in the order of FixedBlock. This is the whole
// of what that arithmetic rounds: rows of x before the first product, and of the activation's f32
// output before the second, are cut along k into blocks of 16 values and become q 2^e, where
//
//   e  is the least integer, but -125 or more, for which no q is beyond 127
//   q  is x 2^-e, rounded to the nearest integer, ties to even
//
// A block of zeros, or of magnitudes below 2^-126, is zeros. A block with a NaN, an infinity or a
// magnitude of 127.5 * 2^104 or more is NaN, and makes its row NaN. Weights stay exact and sums are
// f32; the order of the sums is all that variants differ in.
//
// Why 16: an NVFP4 scale ends a sum of integers there anyway, and a gated panel yields 16 columns
// of the activation, so that who computed them can round them. Why a power of two: it costs no
// multiplication. The sum of integers starts at the bits of 1.5 * 2^(23 + e), which makes it the
// bits of 1.5 * 2^(23 + e) + sum * 2^e; one subtraction leaves the product. And q 2^e is exact
// in bf16, so that kernels for bf16 or f32 can multiply the same numbers.
struct Int8Block {
  int8_t values[16];
  float offset;   // 1.5 * 2^(22 + e), e - 1 because weights are doubled; or NaN
  int32_t start;  // its bits - 12 times the sum of the values, as the correction of FixedBlock
};

// Rows of blocks, one after the other.
template <class Block>
struct BlockRows {
  const Block* data = nullptr;
  int64_t blocks = 0;  // of a row
};
using FixedRows = BlockRows<FixedBlock>;
using Int8Rows = BlockRows<Int8Block>;

// Planes of bf16 that hold a value of this type exactly.
constexpr int tile_planes(Dtype dtype) { return dtype == Dtype::kF32 ? 3 : 1; }

struct ActivationCall {
  Activation activation;
  float product_scale;
  const float* row_scale;  // [rows]: a token's weight where it applies to the input; null for ones
  const float* bias;       // 32 lanes
  float params[kMaxActivationParams];
};

struct CombineCall {
  float product_scale;
  const float* bias;      // 32 lanes
  const int32_t* tokens;  // [rows]: which row of `sums` a product belongs to
  const float* weights;   // [rows]
  float* sums;            // lane 0 of this panel in row 0
  int64_t stride;         // of a row of `sums`, in floats
};

struct Kernels {
  // c[r][lane] = sum_k a[r][k] w[lane][k] over the panel's padded k, for any number of rows.
  // Indexed by Format. `scratch` has kDecodedFloats floats; streaming needs none.
  using PanelF32 = void (*)(const uint8_t* panel, int64_t superblocks, const float* const* a,
                            int rows, float* c, float* scratch);
  PanelF32 stream_f32[kNumFormats] = {};
  PanelF32 panel_f32[kNumFormats] = {};
  int max_stream_rows = 0;  // an expert with more is faster by decoded weights

  // The same on 16-bit integers; null where the variant has none.
  using PanelFixed = void (*)(const uint8_t* panel, int64_t superblocks, const FixedRows& a,
                              int rows, float* c);
  PanelFixed panel_fixed[kNumFormats] = {};
  int max_fixed_rows = 0;  // an expert with more is faster otherwise

  // The same on 8-bit integers, for compute="w4a8"; null where the variant has none.
  using PanelInt8 = void (*)(const uint8_t* panel, int64_t superblocks, const Int8Rows& a, int rows,
                             float* c);
  PanelInt8 panel_int8[kNumFormats] = {};
  // An expert with more goes through other kernels, its rows rounded to the same numbers.
  int max_int8_rows = 0;

  // The same on bf16 tiles; null where f32 kernels do this. `c` has room for rows rounded up to
  // tiles of 16; so have the rows if they meet decoded weights and `whole_tiles` asks for it. Any
  // other rows are one tile without padding.
  using PanelTiles = void (*)(const uint8_t* panel, int64_t superblocks, const TileRows& a,
                              int rows, float* c, float* scratch);
  PanelTiles stream_tiles[kNumFormats] = {};
  PanelTiles panel_tiles[kNumFormats] = {};
  bool whole_tiles = false;

  // Stores columns [k, k + n) of one row of tiles, n a multiple of 16.
  void (*pack_tile_f32)(const float* values, int64_t n, const TileRows& tiles, int64_t row,
                        int64_t k) = nullptr;
  void (*pack_tile_bf16)(const uint16_t* values, int64_t n, const TileRows& tiles, int64_t row,
                         int64_t k) = nullptr;

  // The n values, a multiple of 16, as n / 16 blocks.
  void (*pack_fixed)(const float* values, int64_t n, FixedBlock* blocks) = nullptr;

  // The same as blocks of 8-bit integers; or as these blocks' values, in place.
  void (*pack_int8)(const float* values, int64_t n, Int8Block* blocks) = nullptr;
  void (*round_int8)(float* values, int64_t n) = nullptr;

  // Gated: c[r][0..15] = act(gate lanes, up lanes); else c[r][0..31] = act(c[r]). In place.
  void (*activate)(const ActivationCall& call, float* c, int rows) = nullptr;
  // sums[tokens[r]] += weights[r] * (c[r] * product_scale + bias)
  void (*combine)(const CombineCall& call, const float* c, int rows) = nullptr;
  // c[r] = c[r] * product_scale + bias
  void (*scale)(float product_scale, const float* bias, float* c, int rows) = nullptr;

  void (*widen)(const uint16_t* bf16, float* f32, int64_t n) = nullptr;
  void (*narrow)(const float* f32, uint16_t* bf16, int64_t n) = nullptr;  // round to nearest even

  // Around a participant's work: the AMX tile configuration.
  void (*enter)() = nullptr;
  void (*leave)() = nullptr;

  static constexpr int kDecodedFloats = 256 * 32;
};

// A limit on the rows of an expert that is none.
inline constexpr int kAnyRows = std::numeric_limits<int>::max();

inline constexpr float kProductExponent[kNumFormats] = {256.0f, 1.0f};

// Null where the variant is not compiled into this library.
const Kernels* kernels(Variant variant);

// The tactics by name that a table has kernels for in this arithmetic.
std::vector<Tactic> named_tactics(const Kernels& table, Compute compute);

// One translation unit each, compiled for its instruction set. The tables are constants: code of
// such a unit, be it what fills a table, may have instructions that the machine lacks.
extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvxVnniKernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512VnniKernels;
extern const Kernels kAvx512Bf16Kernels;
extern const Kernels kAmxKernels;
#endif

}  // namespace jaxmoe::cpu

#endif  // JAXMOE_CSRC_CPU_KERNELS_H_
