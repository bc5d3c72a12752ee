// cpu_amx with AMX's instructions modelled in plain C++: its blocking, strides and planes are
// tested on machines that have AVX-512 BF16 but no AMX.
#include "amx_model.h"

#include "cpu/kernel_amx.h"

namespace jaxmoe::cpu {
namespace {

struct ModelTiles {
  struct Registers {
    bool configured = false;
    float tiles[8][16][16];
  };
  static Registers& registers() {
    thread_local Registers instance;
    return instance;
  }
  // Using tiles outside configure and release faults on the hardware.
  static float (*tile(int index))[16] {
    if (!registers().configured) __builtin_trap();
    return registers().tiles[index];
  }

  static void configure() { registers().configured = true; }
  static void release() { registers().configured = false; }

  static __m512i multiply_f16(__m512i a, __m512i b) {
    const auto product = [](__m256i x, __m256i y) {
      return _mm512_cvtps_ph(_mm512_mul_ps(_mm512_cvtph_ps(x), _mm512_cvtph_ps(y)),
                             _MM_FROUND_TO_NEAREST_INT);
    };
    const __m256i low = product(_mm512_castsi512_si256(a), _mm512_castsi512_si256(b));
    const __m256i high = product(_mm512_extracti64x4_epi64(a, 1), _mm512_extracti64x4_epi64(b, 1));
    return _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
  }

  template <int kTile>
  static void zero() {
    std::memset(tile(kTile), 0, 1024);
  }
  template <int kTile>
  static void load(const void* memory, int64_t stride) {
    for (int row = 0; row < 16; ++row) {
      std::memcpy(tile(kTile)[row], static_cast<const uint8_t*>(memory) + row * stride, 64);
    }
  }
  template <int kTile>
  static void store(void* memory, int64_t stride) {
    for (int row = 0; row < 16; ++row) {
      std::memcpy(static_cast<uint8_t*>(memory) + row * stride, tile(kTile)[row], 64);
    }
  }

  static float bf16(const float* pair, int which) {
    uint32_t bits;
    std::memcpy(&bits, pair, sizeof(bits));
    bits = which ? bits & 0xffff0000u : bits << 16;
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
  }
  template <int kProduct, int kRows, int kWeights>
  static void multiply() {
    float(*c)[16] = tile(kProduct);
    float(*a)[16] = tile(kRows);
    float(*b)[16] = tile(kWeights);
    for (int m = 0; m < 16; ++m) {
      for (int k = 0; k < 16; ++k) {
        for (int n = 0; n < 16; ++n) {
          c[m][n] += bf16(&a[m][k], 0) * bf16(&b[k][n], 0);
          c[m][n] += bf16(&a[m][k], 1) * bf16(&b[k][n], 1);
        }
      }
    }
  }
};

}  // namespace

const Kernels& amx_model_kernels() {
  static const Kernels table = [] {
    Kernels kernels;
    fill_amx_kernels<ModelTiles>(kernels);
    return kernels;
  }();
  return table;
}

}  // namespace jaxmoe::cpu
