// Panel x a few rows of 16-bit integers (decode): c[r][lane] = sum_k a[r][k] * scale * e2m1(lane,
// k).
//
// The panel is read once, from memory, with software prefetch. A byte shuffle turns codes into the
// unsigned bytes 2 e2m1 + 12; integer dot products take four of them at a time against the upper
// and the lower bytes of the row, which leaves sixteen products exact in 32 bits. Only then come
// the power of two of the row's block and the scale of the weights' block, in f32.
//
// Isa provides, beside what kernel_f32.h asks for: Weights, load_weights (16 k x kWidth lanes), dot
// for kVectorsTogether of them, and kMaxFixedRows, up to which this is faster than its other
// kernels.
#ifndef JAXMOE_CSRC_CPU_KERNEL_FIXED_H_
#define JAXMOE_CSRC_CPU_KERNEL_FIXED_H_

#include "cpu/kernel_f32.h"

namespace jaxmoe::cpu {

template <class Isa, Format kFormat>
struct PanelFixed {
  using F = typename Isa::F;
  using I = typename Isa::I;
  using M = Math<Isa>;
  using Scale = BlockScale<Isa, kFormat>;

  static constexpr int kWidth = Isa::kWidth;
  static constexpr int kVectors = kPanelLanes / kWidth;
  static constexpr int kBlock = block_size(kFormat);
  static constexpr int kBlocks = kSuperblockK / kBlock;
  static constexpr int kHalves = kBlock / FixedBlock::kValues;
  static constexpr int kBytes = superblock_bytes(kFormat);
  static constexpr int kGroupBytes = kPanelLanes * 4;  // eight k of all lanes
  // Vectors of lanes that share a broadcast of the row.
  static constexpr int kTogether = Isa::kVectorsTogether;
  static constexpr int kPassRows = 4;

  static void run(const uint8_t* panel, int64_t superblocks, const FixedRows& a, int rows,
                  float* c) {
    static constexpr Function kPass[kPassRows + 1] = {nullptr, &pass<1>, &pass<2>, &pass<3>,
                                                      &pass<4>};
    const int passes = (rows + kPassRows - 1) / kPassRows;
    for (int p = 0; p < passes; ++p) {
      const int begin = rows * p / passes, end = rows * (p + 1) / passes;
      kPass[end - begin](panel, superblocks, {a.data + begin * a.blocks, a.blocks},
                         c + begin * kPanelLanes);
    }
  }

 private:
  using Function = void (*)(const uint8_t*, int64_t, const FixedRows&, float*);

  template <int kRows>
  static void pass(const uint8_t* panel, int64_t superblocks, const FixedRows& a, float* c) {
    F sums[kVectors][kRows] = {};
    const FixedBlock* blocks = a.data;
    for (int64_t s = 0; s < superblocks; ++s, panel += kBytes) {
      for (int i = 0; i < kBytes; i += 64) {
        __builtin_prefetch(panel + PanelF32<Isa, kFormat>::kPrefetchBytes + i);
      }
      const uint8_t* codes = panel + scale_bytes(kFormat);
#pragma GCC unroll 4
      for (int b = 0; b < kBlocks; ++b, blocks += kHalves, codes += kBlock / 8 * kGroupBytes) {
        for (int v0 = 0; v0 < kVectors; v0 += kTogether) {
          F partial[kTogether][kRows] = {};
#pragma GCC unroll 2
          for (int half = 0; half < kHalves; ++half) {
            typename Isa::Weights weights[kTogether];
#pragma GCC unroll 2
            for (int v = 0; v < kTogether; ++v) {
              weights[v] = Isa::load_weights(codes + half * 2 * kGroupBytes + (v0 + v) * kWidth * 4,
                                             kGroupBytes);
            }
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
              const FixedBlock& x = blocks[r * a.blocks + half];
              I products[kTogether];
              Isa::dot(weights, x, products);
#pragma GCC unroll 2
              for (int v = 0; v < kTogether; ++v) {
                const F values = __builtin_convertvector(products[v], F);
                partial[v][r] =
                    half ? Isa::fma(values, M::splat(x.scale), partial[v][r]) : values * x.scale;
              }
            }
          }
#pragma GCC unroll 2
          for (int v = 0; v < kTogether; ++v) {
            const Scale scale(panel + b * kPanelLanes + (v0 + v) * kWidth);
#pragma GCC unroll 4
            for (int r = 0; r < kRows; ++r) {
              sums[v0 + v][r] = scale.accumulate(partial[v][r], sums[v0 + v][r]);
            }
          }
        }
      }
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) M::store(c + r * kPanelLanes + v * kWidth, sums[v][r]);
    }
  }
};

// The power of two leaves the largest of the sixteen values its upper 15 bits at least. A block
// with an infinity or a NaN is NaN.
template <class Isa>
struct Fixed {
  static void pack(const float* values, int64_t n, FixedBlock* blocks) {
    for (int64_t i = 0; i < n; i += FixedBlock::kValues) {
      pack_block(values + i, blocks[i / FixedBlock::kValues]);
    }
  }

 private:
  static constexpr int32_t kInfinity = 0x7f800000;
  static constexpr int32_t kNan = 0x7fc00000;
  // Of the exponent: keeps the power of two and its inverse normal numbers.
  static constexpr int32_t kSmallest = 16;
  // Magnitudes that would round to 32640 or more, whose upper byte would be 128, get the next
  // power.
  static constexpr int32_t kRoom = 0x800000 - 0x7efe01;

  // Plain loops, which compilers turn into a few vector instructions each.
  static JAXMOE_INLINE void pack_block(const float* values, FixedBlock& block) {
    constexpr int kCount = FixedBlock::kValues;
    int32_t bits[kCount];
    uint32_t integers[kCount], sum = 0;  // wrapping, for what a NaN leaves here
    std::memcpy(bits, values, sizeof(bits));
    int32_t largest = 0;
    for (int i = 0; i < kCount; ++i) {
      const int32_t magnitude = bits[i] & 0x7fffffff;
      largest = magnitude > largest ? magnitude : largest;
    }
    int32_t exponent = (largest + kRoom) >> 23;
    exponent = exponent < kSmallest ? kSmallest : exponent;
    const float inverse = from_bits((268 - exponent) << 23);
    const float magic = 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the rounded integer
    for (int i = 0; i < kCount; ++i) {
      const float shifted = values[i] * inverse + magic;
      std::memcpy(&integers[i], &shifted, sizeof(shifted));
      integers[i] -= 0x4b400000u;
    }
    for (int i = 0; i < kCount; ++i) sum += integers[i];
    int8_t low[kCount], high[kCount];
    for (int i = 0; i < kCount; ++i) low[i] = static_cast<int8_t>(integers[i]);
    for (int i = 0; i < kCount; ++i) high[i] = static_cast<int8_t>((integers[i] + 128) >> 8);
    order(low, block.low);
    order(high, block.high);
    // Half of it, for the doubled weights.
    block.scale = from_bits(largest >= kInfinity ? kNan : (exponent - 15) << 23);
    block.correction = static_cast<int32_t>(0u - 12u * sum);
  }

  static JAXMOE_INLINE float from_bits(int32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
  static JAXMOE_INLINE void order(const int8_t* from, int8_t* to) {
    typedef int8_t Bytes __attribute__((vector_size(16)));
    Bytes v;
    std::memcpy(&v, from, sizeof(v));
    v = __builtin_shufflevector(v, v, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    std::memcpy(to, &v, sizeof(v));
  }
};

template <class Isa>
constexpr void fill_fixed(Kernels& table) {
  table.panel_fixed[static_cast<int>(Format::kNvfp4)] = &PanelFixed<Isa, Format::kNvfp4>::run;
  table.panel_fixed[static_cast<int>(Format::kMxfp4)] = &PanelFixed<Isa, Format::kMxfp4>::run;
  table.max_fixed_rows = Isa::kMaxFixedRows;
  table.pack_fixed = &Fixed<Isa>::pack;
}

// 2 e2m1 + 12 by code.
inline constexpr uint8_t kUnsignedWeights[16] = {12, 13, 14, 15, 16, 18, 20, 24,
                                                 12, 11, 10, 9,  8,  6,  4,  0};

}  // namespace jaxmoe::cpu

#endif  // JAXMOE_CSRC_CPU_KERNEL_FIXED_H_
