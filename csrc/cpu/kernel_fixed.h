// Panel x rows of integers: c[r][lane] = sum_k a[r][k] * scale * e2m1(lane, k). 16-bit integers for
// a few rows (decode), or for all where nothing else is faster; 8-bit ones for compute="w4a8".
//
// A pass of a few rows reads the panel once, from memory if it is the first, with software
// prefetch. A byte shuffle turns codes into the unsigned bytes 2 e2m1 + 12; integer dot products
// take four of them at a time against the upper and the lower bytes of the row, or against its only
// bytes, which leaves sixteen products exact in 32 bits. Only then come the power of two of the
// row's block and the scale of the weights' block, in f32. More rows take more passes: the shuffles
// run beside the products, and decoding a panel once for all rows saves nothing.
//
// Isa provides, beside what kernel_f32.h asks for: Weights, load_weights (16 k x kWidth lanes), dot
// for kVectorsTogether of them and either kind of block, and kMaxFixedRows, up to which 16-bit
// integers are faster than its other kernels.
#ifndef JAXMOE_CSRC_CPU_KERNEL_FIXED_H_
#define JAXMOE_CSRC_CPU_KERNEL_FIXED_H_

#include "cpu/kernel_f32.h"

namespace jaxmoe::cpu {

// What is left to do for a vector of integer sums over sixteen k, and how two of them add up.
template <class Isa>
struct IntegerSums {
  using F = typename Isa::F;
  using I = typename Isa::I;
  using M = Math<Isa>;

  static JAXMOE_INLINE F value(I sum, const FixedBlock& x) {
    return __builtin_convertvector(sum, F) * x.scale;
  }
  static JAXMOE_INLINE F add(I sum, const FixedBlock& x, F other) {
    return Isa::fma(__builtin_convertvector(sum, F), M::splat(x.scale), other);
  }
  static JAXMOE_INLINE F value(I sum, const Int8Block& x) { return (F)sum - M::splat(x.offset); }
  static JAXMOE_INLINE F add(I sum, const Int8Block& x, F other) { return value(sum, x) + other; }
};

template <class Isa, Format kFormat, class Block>
struct PanelFixed {
  using F = typename Isa::F;
  using I = typename Isa::I;
  using M = Math<Isa>;
  using Sums = IntegerSums<Isa>;
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
  // Measured: passes of four are 0 to 10 % slower, by the instruction set.
  static constexpr int kPassRows = 8;

  static void run(const uint8_t* panel, int64_t superblocks, const BlockRows<Block>& a, int rows,
                  float* c) {
    static constexpr Table kPass = passes(std::make_integer_sequence<int, kPassRows>{});
    const int count = (rows + kPassRows - 1) / kPassRows;
    for (int p = 0; p < count; ++p) {
      const int begin = rows * p / count, end = rows * (p + 1) / count;
      kPass.of[end - begin](panel, superblocks, {a.data + begin * a.blocks, a.blocks},
                            c + begin * kPanelLanes);
    }
  }

 private:
  using Function = void (*)(const uint8_t*, int64_t, const BlockRows<Block>&, float*);
  struct Table {
    Function of[kPassRows + 1];
  };
  template <int... kRows>
  static constexpr Table passes(std::integer_sequence<int, kRows...>) {
    return {{nullptr, &pass<kRows + 1>...}};
  }

  template <int kRows>
  static void pass(const uint8_t* panel, int64_t superblocks, const BlockRows<Block>& a, float* c) {
    F sums[kVectors][kRows] = {};
    const Block* blocks = a.data;
    for (int64_t s = 0; s < superblocks; ++s, panel += kBytes) {
      prefetch_ahead<kBytes>(panel);
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
#pragma GCC unroll 8
            for (int r = 0; r < kRows; ++r) {
              const Block& x = blocks[r * a.blocks + half];
              I products[kTogether];
              Isa::dot(weights, x, products);
#pragma GCC unroll 2
              for (int v = 0; v < kTogether; ++v) {
                partial[v][r] =
                    half ? Sums::add(products[v], x, partial[v][r]) : Sums::value(products[v], x);
              }
            }
          }
#pragma GCC unroll 2
          for (int v = 0; v < kTogether; ++v) {
            const Scale scale(panel + b * kPanelLanes + (v0 + v) * kWidth);
#pragma GCC unroll 8
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

// Plain loops, which compilers turn into a few vector instructions each.
template <class Isa>
struct SixteenFloats {
  static constexpr int kCount = FixedBlock::kValues;
  static constexpr int32_t kNan = 0x7fc00000;

  static JAXMOE_INLINE float from_bits(int32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
  // The bits of the largest magnitude.
  static JAXMOE_INLINE int32_t largest(const float* values) {
    int32_t bits[kCount];
    std::memcpy(bits, values, sizeof(bits));
    int32_t most = 0;
    for (int i = 0; i < kCount; ++i) {
      const int32_t magnitude = bits[i] & 0x7fffffff;
      most = magnitude > most ? magnitude : most;
    }
    return most;
  }
  // The biased exponent of a magnitude, at least `smallest`; that of the next power of two where
  // less than `room` is left to it.
  static JAXMOE_INLINE int32_t exponent(int32_t magnitude, int32_t room, int32_t smallest) {
    const uint32_t bits = static_cast<uint32_t>(magnitude) + static_cast<uint32_t>(room);
    const int32_t result = static_cast<int32_t>(bits >> 23);
    return result < smallest ? smallest : result;
  }
  // The nearest integers to the values times `inverse`, and their sum; wrapping, for what a NaN
  // leaves here.
  static JAXMOE_INLINE uint32_t round(const float* values, float inverse, uint32_t* integers) {
    const float magic = 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the rounded integer
    uint32_t sum = 0;
    for (int i = 0; i < kCount; ++i) {
      const float shifted = values[i] * inverse + magic;
      std::memcpy(&integers[i], &shifted, sizeof(shifted));
      integers[i] -= 0x4b400000u;
    }
    for (int i = 0; i < kCount; ++i) sum += integers[i];
    return sum;
  }
  static JAXMOE_INLINE void order(const int8_t* from, int8_t* to) {
    typedef int8_t Bytes __attribute__((vector_size(16)));
    Bytes v;
    std::memcpy(&v, from, sizeof(v));
    v = __builtin_shufflevector(v, v, 0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
    std::memcpy(to, &v, sizeof(v));
  }
};

// The power of two leaves the largest of the sixteen values its upper 15 bits at least. A block
// with an infinity or a NaN is NaN.
template <class Isa>
struct Fixed {
  using Sixteen = SixteenFloats<Isa>;
  static constexpr int kCount = Sixteen::kCount;

  static void pack(const float* values, int64_t n, FixedBlock* blocks) {
    for (int64_t i = 0; i < n; i += kCount) pack_block(values + i, blocks[i / kCount]);
  }

 private:
  static constexpr int32_t kInfinity = 0x7f800000;
  // Of the exponent: keeps the power of two and its inverse normal numbers.
  static constexpr int32_t kSmallest = 16;
  // Magnitudes that would round to 32640 or more, whose upper byte would be 128, get the next
  // power.
  static constexpr int32_t kRoom = 0x800000 - 0x7efe01;

  static JAXMOE_INLINE void pack_block(const float* values, FixedBlock& block) {
    const int32_t largest = Sixteen::largest(values);
    const int32_t exponent = Sixteen::exponent(largest, kRoom, kSmallest);
    uint32_t integers[kCount];
    const uint32_t sum =
        Sixteen::round(values, Sixteen::from_bits((268 - exponent) << 23), integers);
    int8_t low[kCount], high[kCount];
    for (int i = 0; i < kCount; ++i) low[i] = static_cast<int8_t>(integers[i]);
    for (int i = 0; i < kCount; ++i) high[i] = static_cast<int8_t>((integers[i] + 128) >> 8);
    Sixteen::order(low, block.low);
    Sixteen::order(high, block.high);
    // Half of it, for the doubled weights.
    block.scale = Sixteen::from_bits(largest >= kInfinity ? Sixteen::kNan : (exponent - 15) << 23);
    block.correction = static_cast<int32_t>(0u - 12u * sum);
  }
};

// As Int8Block says.
template <class Isa>
struct Int8 {
  using Sixteen = SixteenFloats<Isa>;
  static constexpr int kCount = Sixteen::kCount;

  static void pack(const float* values, int64_t n, Int8Block* blocks) {
    for (int64_t i = 0; i < n; i += kCount) pack_block(values + i, blocks[i / kCount]);
  }
  static void round_all(float* values, int64_t n) {
    for (int64_t i = 0; i < n; i += kCount) round_block(values + i);
  }

 private:
  // e is the biased exponent less 133. With the largest the offset is finite.
  static constexpr int32_t kSmallest = 8, kLargest = 237;
  static constexpr int32_t kRoom = 0x800000 - 0x7f0000;  // from 127.5 units on

  static JAXMOE_INLINE void pack_block(const float* values, Int8Block& block) {
    const int32_t exponent = Sixteen::exponent(Sixteen::largest(values), kRoom, kSmallest);
    uint32_t integers[kCount];
    const uint32_t sum =
        Sixteen::round(values, Sixteen::from_bits((260 - exponent) << 23), integers);
    int8_t bytes[kCount];
    for (int i = 0; i < kCount; ++i) bytes[i] = static_cast<int8_t>(integers[i]);
    Sixteen::order(bytes, block.values);
    const int32_t offset = exponent > kLargest ? Sixteen::kNan : ((exponent + 16) << 23) | 0x400000;
    block.offset = Sixteen::from_bits(offset);
    block.start = static_cast<int32_t>(static_cast<uint32_t>(offset) - 12u * sum);
  }

  static JAXMOE_INLINE void round_block(float* values) {
    const int32_t exponent = Sixteen::exponent(Sixteen::largest(values), kRoom, kSmallest);
    uint32_t integers[kCount];
    Sixteen::round(values, Sixteen::from_bits((260 - exponent) << 23), integers);
    const float unit =
        Sixteen::from_bits(exponent > kLargest ? Sixteen::kNan : (exponent - 6) << 23);
    for (int i = 0; i < kCount; ++i) {
      values[i] = static_cast<float>(static_cast<int32_t>(integers[i])) * unit;
    }
  }
};

template <class Isa>
constexpr void fill_fixed(Kernels& table) {
  constexpr int kNvfp4 = static_cast<int>(Format::kNvfp4),
                kMxfp4 = static_cast<int>(Format::kMxfp4);
  table.panel_fixed[kNvfp4] = &PanelFixed<Isa, Format::kNvfp4, FixedBlock>::run;
  table.panel_fixed[kMxfp4] = &PanelFixed<Isa, Format::kMxfp4, FixedBlock>::run;
  table.max_fixed_rows = Isa::kMaxFixedRows;
  table.pack_fixed = &Fixed<Isa>::pack;
}

template <class Isa>
constexpr void fill_int8(Kernels& table) {
  constexpr int kNvfp4 = static_cast<int>(Format::kNvfp4),
                kMxfp4 = static_cast<int>(Format::kMxfp4);
  table.panel_int8[kNvfp4] = &PanelFixed<Isa, Format::kNvfp4, Int8Block>::run;
  table.panel_int8[kMxfp4] = &PanelFixed<Isa, Format::kMxfp4, Int8Block>::run;
  table.max_int8_rows = kAnyRows;
  table.pack_int8 = &Int8<Isa>::pack;
  table.round_int8 = &Int8<Isa>::round_all;
}

// 2 e2m1 + 12 by code.
inline constexpr uint8_t kUnsignedWeights[16] = {12, 13, 14, 15, 16, 18, 20, 24,
                                                 12, 11, 10, 9,  8,  6,  4,  0};

}  // namespace jaxmoe::cpu

#endif  // JAXMOE_CSRC_CPU_KERNEL_FIXED_H_
