// cpu_portable: plain C++ on four-lane vectors (SSE2 on x86-64, NEON on aarch64), no intrinsics.
#include <array>

#include "cpu/epilogue.h"
#include "cpu/kernel_fixed.h"

namespace jaxmoe::cpu {
namespace {

// e4m3 (bias 7, three mantissa bits, no infinities) times 2^-8, as the f16 route of the other
// variants yields it.
std::array<float, 256> make_e4m3_table() {
  std::array<float, 256> table;
  for (int byte = 0; byte < 256; ++byte) {
    const int exponent = (byte >> 3) & 15, mantissa = byte & 7;
    float value =
        exponent ? 8.0f + mantissa : mantissa;  // units of 2^-9 * 2^(max(exponent, 1) - 1)
    for (int i = 1; i < exponent; ++i) value *= 2.0f;
    value /= 512.0f * 256.0f;
    table[byte] = byte & 0x80 ? -value : value;
  }
  return table;
}
const std::array<float, 256> kE4m3 = make_e4m3_table();

struct Isa {
  static constexpr int kWidth = 4;
  static constexpr int kStreamRows = 2;
  static constexpr int kMaxOwnStreamRows = 0;
  static constexpr int kRowTile = 6;
  static constexpr int kColumnVectors = 2;
  using F = VectorTypes<kWidth>::F;
  using I = VectorTypes<kWidth>::I;
  using Codes = VectorTypes<kWidth>::U;

  static JAXMOE_INLINE F fma(F a, F b, F c) { return a * b + c; }

  static JAXMOE_INLINE Codes load_codes(const uint8_t* p) {
    Codes codes;
    std::memcpy(&codes, p, sizeof(codes));
    return codes;
  }

  // Exponent and mantissa bit moved to their places in f32, read with an implicit one. Codes 0 and
  // 1 (0 and 0.5) are read as 1 and 1.5 first and have the one taken off: e2m1's subnormals without
  // f32's, which may be flushed.
  template <int kIndex>
  static JAXMOE_INLINE F decode(Codes codes) {
    const Codes magnitude = (codes >> (4 * kIndex)) & 7;
    const Codes subnormal = (Codes)(magnitude < 2);
    const Codes bits = ((magnitude | (subnormal & 2)) << 22) + (126u << 23);
    const Codes one = subnormal & 0x3f800000u;
    const F value = (F)bits - (F)one;
    const Codes sign = (codes << (28 - 4 * kIndex)) & 0x80000000u;
    return (F)((Codes)value | sign);
  }

  static JAXMOE_INLINE F e4m3_scale(const uint8_t* p) {
    return F{kE4m3[p[0]], kE4m3[p[1]], kE4m3[p[2]], kE4m3[p[3]]};
  }

  // Two factors: 2^-127 alone would be subnormal and 2^128 infinite.
  struct E8m0 {
    F low, high;
    explicit JAXMOE_INLINE E8m0(const uint8_t* p) {
      const I exponent = I{p[0], p[1], p[2], p[3]} - 127;
      const I half = exponent >> 1;
      low = (F)((half + 127) << 23);
      high = (F)((exponent - half + 127) << 23);
    }
    JAXMOE_INLINE F times(F x) const { return x * low * high; }
    JAXMOE_INLINE F accumulate(F x, F sum) const { return times(x) + sum; }
  };
};

constexpr Kernels make_table() {
  Kernels table;
  fill_f32<Isa>(table);
  table.round_int8 = &Int8<Isa>::round_all;
  return table;
}

}  // namespace

constexpr Kernels kPortableKernels = make_table();

}  // namespace jaxmoe::cpu
