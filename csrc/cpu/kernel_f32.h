// Panel x rows in f32: c[r][lane] = sum_k a[r][k] * scale * e2m1(lane, k).
//
// Streaming, the faster way for up to kStreamRows rows (decode): the panel is read once for them,
// from memory, with software prefetch. A lane's dword of eight codes stays in a register; each code
// becomes its f32 value by a table lookup and meets one broadcast of the row. A block is summed
// unscaled and then joins the accumulator by one FMA with its scale.
//
// Decoding, for more rows: two superblocks at a time are decoded to scaled f32 in L1 (16 KB), then
// kRowTile rows x kColumnVectors vectors of accumulators run over them. All weights are exact in
// f32 either way.
//
// Isa provides: kWidth, F, I, Codes, fma, load_codes, decode<j>, e4m3_scale (times 2^-8), E8m0 and
// its product; and, if it has a faster one, its own stream for up to kMaxOwnStreamRows rows.
#ifndef JAXMOE_CSRC_CPU_KERNEL_F32_H_
#define JAXMOE_CSRC_CPU_KERNEL_F32_H_

#include <utility>

#include "cpu/epilogue.h"
#include "cpu/kernels.h"
#include "cpu/layout.h"
#include "cpu/vector_math.h"

namespace jaxmoe::cpu {

template <class Function, int... kIndex>
JAXMOE_INLINE void unroll(std::integer_sequence<int, kIndex...>, Function function) {
  (function(std::integral_constant<int, kIndex>{}), ...);
}

// Scales of kWidth lanes of one block row.
template <class Isa, Format kFormat>
struct BlockScale;

template <class Isa>
struct BlockScale<Isa, Format::kNvfp4> {
  typename Isa::F scale;
  explicit JAXMOE_INLINE BlockScale(const uint8_t* bytes) : scale(Isa::e4m3_scale(bytes)) {}
  JAXMOE_INLINE typename Isa::F times(typename Isa::F x) const { return x * scale; }
  JAXMOE_INLINE typename Isa::F accumulate(typename Isa::F x, typename Isa::F sum) const {
    return Isa::fma(x, scale, sum);
  }
};

template <class Isa>
struct BlockScale<Isa, Format::kMxfp4> {
  typename Isa::E8m0 scale;
  explicit JAXMOE_INLINE BlockScale(const uint8_t* bytes) : scale(bytes) {}
  JAXMOE_INLINE typename Isa::F times(typename Isa::F x) const { return scale.times(x); }
  JAXMOE_INLINE typename Isa::F accumulate(typename Isa::F x, typename Isa::F sum) const {
    return scale.accumulate(x, sum);
  }
};

// Asks for what stands so far behind these weights. Into L2: lines on their way to L1 are too few
// to keep one core's share of the memory busy, and L2 is near enough for the loads that follow.
template <int kBytes>
JAXMOE_INLINE void prefetch_ahead(const uint8_t* weights) {
  constexpr int kAhead = 8192, kIntoL2 = 2;
  for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(weights + kAhead + i, 0, kIntoL2);
}

template <class Isa, Format kFormat>
struct PanelF32 {
  using F = typename Isa::F;
  using M = Math<Isa>;
  using Scale = BlockScale<Isa, kFormat>;
  using Eight = std::make_integer_sequence<int, 8>;

  static constexpr int kWidth = Isa::kWidth;
  static constexpr int kVectors = kPanelLanes / kWidth;
  static constexpr int kBlock = block_size(kFormat);
  static constexpr int kBlocks = kSuperblockK / kBlock;
  static constexpr int kGroups = kBlock / 8;
  static constexpr int kScaleBytes = scale_bytes(kFormat);
  static constexpr int kBytes = superblock_bytes(kFormat);
  static constexpr int kStreamRows = Isa::kStreamRows;
  static constexpr int kChunkSuperblocks = Kernels::kDecodedFloats / kPanelLanes / kSuperblockK;

  static void stream_all(const uint8_t* panel, int64_t superblocks, const float* const* a, int rows,
                         float* c, float*) {
    static constexpr auto kStream = streams(std::make_integer_sequence<int, kStreamRows>{});
    const int passes = (rows + kStreamRows - 1) / kStreamRows;
    for (int pass = 0; pass < passes; ++pass) {
      const int begin = rows * pass / passes, end = rows * (pass + 1) / passes;
      kStream[end - begin](panel, superblocks, a + begin, c + begin * kPanelLanes);
    }
  }

  static void run(const uint8_t* panel, int64_t superblocks, const float* const* a, int rows,
                  float* c, float* scratch) {
    for (int64_t s = 0; s < superblocks; s += kChunkSuperblocks) {
      const int64_t left = superblocks - s;
      const int chunk = static_cast<int>(left < kChunkSuperblocks ? left : kChunkSuperblocks);
      for (int i = 0; i < chunk; ++i) {
        decode(panel + (s + i) * kBytes, scratch + i * kSuperblockK * kPanelLanes);
      }
      multiply_all(scratch, chunk * kSuperblockK, a, s * kSuperblockK, rows, c, s == 0);
    }
  }

 private:
  template <int kRows>
  static void stream(const uint8_t* panel, int64_t superblocks, const float* const* a, float* c) {
    if constexpr (kRows <= Isa::kMaxOwnStreamRows) {
      return Isa::template stream<kFormat, kRows>(panel, superblocks, a, c);
    }
    // Two vectors of lanes share the rows' broadcasts while registers last. A single row would wait
    // for its own sums.
    constexpr int kPair = kRows <= 4 ? 2 : 1, kChains = kRows == 1 ? 2 : 1;
    F sums[kVectors][kRows] = {};
    for (int64_t s = 0; s < superblocks; ++s, panel += kBytes) {
      prefetch_ahead<kBytes>(panel);
      const uint8_t* codes = panel + kScaleBytes;
      for (int b = 0; b < kBlocks; ++b) {
        const int64_t k0 = s * kSuperblockK + b * kBlock;
        for (int v0 = 0; v0 < kVectors; v0 += kPair) {
          F partial[kPair][kRows][kChains] = {};
#pragma GCC unroll 4
          for (int g = 0; g < kGroups; ++g) {
            const uint8_t* group = codes + ((b * kGroups + g) * kPanelLanes + v0 * kWidth) * 4;
            typename Isa::Codes dwords[kPair];
#pragma GCC unroll 2
            for (int v = 0; v < kPair; ++v) dwords[v] = Isa::load_codes(group + v * kWidth * 4);
            unroll(Eight{}, [&](auto j) JAXMOE_LAMBDA {
              F weights[kPair];
#pragma GCC unroll 2
              for (int v = 0; v < kPair; ++v) weights[v] = Isa::template decode<j>(dwords[v]);
#pragma GCC unroll 8
              for (int r = 0; r < kRows; ++r) {
                const F x = M::splat(a[r][k0 + g * 8 + j]);
#pragma GCC unroll 2
                for (int v = 0; v < kPair; ++v) {
                  F& sum = partial[v][r][j % kChains];
                  sum = Isa::fma(weights[v], x, sum);
                }
              }
            });
          }
#pragma GCC unroll 2
          for (int v = 0; v < kPair; ++v) {
            const Scale scale(panel + b * kPanelLanes + (v0 + v) * kWidth);
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
              F block = partial[v][r][0];
              if constexpr (kChains == 2) block += partial[v][r][1];
              sums[v0 + v][r] = scale.accumulate(block, sums[v0 + v][r]);
            }
          }
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) M::store(c + r * kPanelLanes + v * kWidth, sums[v][r]);
    }
  }

  // One superblock to scaled[k][lane].
  static void decode(const uint8_t* superblock, float* scaled) {
    prefetch_ahead<kBytes>(superblock);
    const uint8_t* codes = superblock + kScaleBytes;
    for (int b = 0; b < kBlocks; ++b) {
      for (int v = 0; v < kVectors; ++v) {
        const Scale scale(superblock + b * kPanelLanes + v * kWidth);
        for (int g = 0; g < kGroups; ++g) {
          const int group = b * kGroups + g;
          const auto dwords = Isa::load_codes(codes + (group * kPanelLanes + v * kWidth) * 4);
          unroll(Eight{}, [&](auto j) JAXMOE_LAMBDA {
            M::store(scaled + (group * 8 + j) * kPanelLanes + v * kWidth,
                     scale.times(Isa::template decode<j>(dwords)));
          });
        }
      }
    }
  }

  // Rows in passes of nearly equal size: 13 rows are 7 + 6, not 12 + 1.
  static void multiply_all(const float* b, int k, const float* const* a, int64_t k0, int rows,
                           float* c, bool first) {
    static constexpr auto kMultiply = multiplies(std::make_integer_sequence<int, Isa::kRowTile>{});
    const int passes = (rows + Isa::kRowTile - 1) / Isa::kRowTile;
    for (int pass = 0; pass < passes; ++pass) {
      const int begin = rows * pass / passes, end = rows * (pass + 1) / passes;
      kMultiply[end - begin](b, k, a + begin, k0, c + begin * kPanelLanes, first);
    }
  }

  template <int kRows>
  static void multiply(const float* b, int k, const float* const* a, int64_t k0, float* c,
                       bool first) {
    constexpr int kColumns = Isa::kColumnVectors;
    for (int v = 0; v < kVectors; v += kColumns, b += kColumns * kWidth, c += kColumns * kWidth) {
      F sums[kRows][kColumns];
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int n = 0; n < kColumns; ++n) {
          sums[r][n] = first ? F{} : M::load(c + r * kPanelLanes + n * kWidth);
        }
      }
      for (int i = 0; i < k; ++i) {
        F weights[kColumns];
#pragma GCC unroll 4
        for (int n = 0; n < kColumns; ++n) weights[n] = M::load(b + i * kPanelLanes + n * kWidth);
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          const F x = M::splat(a[r][k0 + i]);
#pragma GCC unroll 4
          for (int n = 0; n < kColumns; ++n) sums[r][n] = Isa::fma(weights[n], x, sums[r][n]);
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int n = 0; n < kColumns; ++n) M::store(c + r * kPanelLanes + n * kWidth, sums[r][n]);
      }
    }
  }

  using StreamFunction = void (*)(const uint8_t*, int64_t, const float* const*, float*);
  using MultiplyFunction = void (*)(const float*, int, const float* const*, int64_t, float*, bool);
  template <class Function, int kCount>
  struct Table {
    Function functions[kCount + 1];
    Function operator[](int rows) const { return functions[rows]; }
  };
  template <int... kRows>
  static constexpr Table<StreamFunction, sizeof...(kRows)> streams(
      std::integer_sequence<int, kRows...>) {
    return {{nullptr, &stream<kRows + 1>...}};
  }
  template <int... kRows>
  static constexpr Table<MultiplyFunction, sizeof...(kRows)> multiplies(
      std::integer_sequence<int, kRows...>) {
    return {{nullptr, &multiply<kRows + 1>...}};
  }
};

// The entries of the table that every variant fills in the same way.
template <class Isa>
constexpr void fill_f32(Kernels& table) {
  using EpilogueType = Epilogue<Isa>;
  using Nvfp4 = PanelF32<Isa, Format::kNvfp4>;
  using Mxfp4 = PanelF32<Isa, Format::kMxfp4>;
  table.stream_f32[static_cast<int>(Format::kNvfp4)] = &Nvfp4::stream_all;
  table.stream_f32[static_cast<int>(Format::kMxfp4)] = &Mxfp4::stream_all;
  table.panel_f32[static_cast<int>(Format::kNvfp4)] = &Nvfp4::run;
  table.panel_f32[static_cast<int>(Format::kMxfp4)] = &Mxfp4::run;
  table.max_stream_rows = Isa::kStreamRows;
  table.activate = &EpilogueType::activate;
  table.combine = &EpilogueType::combine;
  table.scale = &EpilogueType::scale;
  table.widen = &EpilogueType::widen;
  table.narrow = &EpilogueType::narrow;
}

}  // namespace jaxmoe::cpu

#endif  // JAXMOE_CSRC_CPU_KERNEL_F32_H_
