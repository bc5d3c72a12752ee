// A plain f64 model of packed FP4 weights and of the two operations, written from the format
// definitions: it shares nothing with the kernels but the layout's description.
#ifndef JAXMOE_TESTS_CPP_REFERENCE_H_
#define JAXMOE_TESTS_CPP_REFERENCE_H_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <vector>

#include "cpu/types.h"

namespace jaxmoe::reference {

using cpu::Activation;
using cpu::Format;

inline double e2m1(int code) {
  static const double kMagnitudes[8] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
  return code & 8 ? -kMagnitudes[code & 7] : kMagnitudes[code & 7];
}
inline double e4m3(int byte) {
  const int exponent = (byte >> 3) & 15, mantissa = byte & 7;
  const double value =
      exponent ? std::ldexp(1 + mantissa / 8.0, exponent - 7) : std::ldexp(mantissa / 8.0, -6);
  return byte & 0x80 ? -value : value;
}
inline double e8m0(int byte) { return std::ldexp(1.0, byte - 127); }

// W[experts, n, k] as codes and scale bytes.
struct Weights {
  Format format;
  int64_t experts, n, k;
  std::vector<uint8_t> codes;   // [experts, n, k]
  std::vector<uint8_t> scales;  // [experts, n, k / block]
  std::vector<float> global;    // [experts]

  int block() const { return format == Format::kNvfp4 ? 16 : 32; }
  int code(int64_t e, int64_t row, int64_t i) const { return codes[(e * n + row) * k + i]; }
  int scale(int64_t e, int64_t row, int64_t b) const {
    return scales[(e * n + row) * (k / block()) + b];
  }
  double value(int64_t e, int64_t row, int64_t i) const {
    const int byte = scale(e, row, i / block());
    return e2m1(code(e, row, i)) * (format == Format::kNvfp4 ? e4m3(byte) : e8m0(byte)) * global[e];
  }

  // panel32, byte by byte from its description.
  std::vector<uint8_t> pack(bool gated) const {
    const int64_t outputs = gated ? n / 2 : n, width = gated ? 16 : 32;
    const int64_t panels = (outputs + width - 1) / width, superblocks = (k + 63) / 64;
    std::vector<uint8_t> packed;
    const auto row_of = [&](int64_t panel, int lane) -> int64_t {
      const int64_t index = panel * width + (gated ? lane % 16 : lane);
      if (index >= outputs) return -1;
      return gated && lane >= 16 ? outputs + index : index;
    };
    for (int64_t e = 0; e < experts; ++e) {
      for (int64_t p = 0; p < panels; ++p) {
        for (int64_t s = 0; s < superblocks; ++s) {
          for (int64_t b = s * 64 / block(); b < (s + 1) * 64 / block(); ++b) {
            for (int lane = 0; lane < 32; ++lane) {
              const int64_t row = row_of(p, lane);
              packed.push_back(row >= 0 && b < k / block() ? static_cast<uint8_t>(scale(e, row, b))
                                                           : 0);
            }
          }
          for (int group = 0; group < 8; ++group) {
            for (int lane = 0; lane < 32; ++lane) {
              const int64_t row = row_of(p, lane);
              uint32_t dword = 0;
              for (int j = 0; j < 8; ++j) {
                const int64_t i = s * 64 + group * 8 + j;
                if (row >= 0 && i < k) dword |= static_cast<uint32_t>(code(e, row, i)) << (4 * j);
              }
              for (int byte = 0; byte < 4; ++byte)
                packed.push_back(static_cast<uint8_t>(dword >> (8 * byte)));
            }
          }
        }
      }
    }
    return packed;
  }
};

using Random = std::mt19937;

inline double uniform(Random& random, double low, double high) {
  return std::uniform_real_distribution<double>(low, high)(random);
}

enum class Grid { kOrdinary, kExact, kWide };

// kExact: sums of products are exact in f32. kWide: every scale that the format has.
inline Weights random_weights(Format format, int64_t experts, int64_t n, int64_t k, Grid grid,
                              Random& random) {
  Weights w = {format, experts, n, k, {}, {}, {}};
  const bool nvfp4 = format == Format::kNvfp4;
  for (int64_t i = 0; i < experts * n * k; ++i) w.codes.push_back(random() % 16);
  for (int64_t i = 0; i < experts * n * (k / w.block()); ++i) {
    int byte;
    if (grid == Grid::kExact) {
      byte =
          nvfp4 ? 0x38 + 8 * static_cast<int>(random() % 2) : 127 + static_cast<int>(random() % 2);
    } else if (grid == Grid::kWide) {
      byte = nvfp4 ? static_cast<int>(random() % 0x7f) | (random() % 2 ? 0x80 : 0)
                   : static_cast<int>(random() % 255);
    } else {
      byte =
          nvfp4 ? 0x28 + static_cast<int>(random() % 0x20) : 124 + static_cast<int>(random() % 6);
    }
    w.scales.push_back(static_cast<uint8_t>(byte));
  }
  for (int64_t e = 0; e < experts; ++e) {
    w.global.push_back(
        grid == Grid::kOrdinary && nvfp4 ? static_cast<float>(uniform(random, 0.5, 2)) : 0.5f);
  }
  return w;
}

inline float bf16_round(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = (bits + 0x7fff + ((bits >> 16) & 1)) & 0xffff0000u;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline uint16_t bf16_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return static_cast<uint16_t>(bits >> 16);
}
inline float bf16_value(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// Rows of values as compute="w4a8" multiplies them, from the rule of cpu::Int8Block: in blocks of
// 16, the nearest integers, none beyond 127, times the least power of two from 2^-125 on.
inline void round_int8(std::vector<double>& values) {
  for (size_t begin = 0; begin < values.size(); begin += 16) {
    double largest = 0;
    bool finite = true;
    for (size_t i = begin; i < begin + 16; ++i) {
      finite &= std::isfinite(values[i]);
      largest = std::max(largest, std::abs(values[i]));
    }
    finite &= largest < std::ldexp(127.5, 104);
    int e = -125;
    while (finite && std::nearbyint(std::ldexp(largest, -e)) > 127) ++e;
    for (size_t i = begin; i < begin + 16; ++i) {
      values[i] = finite ? std::ldexp(std::nearbyint(std::ldexp(values[i], -e)), e)
                         : std::numeric_limits<double>::quiet_NaN();
    }
  }
}

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
inline double gelu(double x) { return 0.5 * x * std::erfc(-x / std::sqrt(2.0)); }
inline double gelu_tanh(double x) {
  return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
}

inline double activate(Activation activation, double gate, double up, const double* p) {
  switch (activation) {
    case Activation::kSwiglu: {
      const double g = std::min(gate, p[2]), u = std::max(std::min(up, p[2]), -p[2]);
      return g * sigmoid(p[0] * g) * (u + p[1]);
    }
    case Activation::kSwigluStep:
      return std::min(gate * sigmoid(gate), p[0]) * std::max(std::min(up, p[0]), -p[0]);
    case Activation::kGeglu:
      return gelu(gate) * up;
    case Activation::kGegluTanh:
      return gelu_tanh(gate) * up;
    case Activation::kSitu:
      return p[0] * std::tanh(gate / p[0]) * sigmoid(gate) * p[1] * std::tanh(up / p[1]);
    case Activation::kRelu2:
      return std::max(gate, 0.0) * std::max(gate, 0.0);
    case Activation::kSilu:
      return gate * sigmoid(gate);
    case Activation::kGelu:
      return gelu(gate);
    case Activation::kGeluTanh:
      return gelu_tanh(gate);
    case Activation::kRelu:
      return std::max(gate, 0.0);
    case Activation::kIdentity:
      return gate;
  }
  return std::numeric_limits<double>::quiet_NaN();
}

inline double relative_error(const std::vector<double>& got, const std::vector<double>& want) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    difference += (got[i] - want[i]) * (got[i] - want[i]);
    norm += want[i] * want[i];
  }
  return norm > 0 ? std::sqrt(difference / norm) : std::sqrt(difference);
}

}  // namespace jaxmoe::reference

#endif  // JAXMOE_TESTS_CPP_REFERENCE_H_
