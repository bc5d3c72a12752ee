// cpu_amx: the tile kernels with TDPBF16PS.
//
// As assembly, because GCC's intrinsics take tile numbers as literal text only, and GCC 12's
// _tile_loadconfig reads eight bytes of the configuration and lets the compiler drop the stores of
// the rest.
#include "cpu/kernel_amx.h"

namespace jaxmoe::cpu {
namespace {

struct AmxTiles {
  static JAXMOE_INLINE __m512i multiply_f16(__m512i a, __m512i b) {
    return _mm512_castph_si512(_mm512_mul_ph(_mm512_castsi512_ph(a), _mm512_castsi512_ph(b)));
  }

  static void configure() {
    struct {
      uint8_t palette = 1;
      uint8_t start_row = 0;
      uint8_t reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    static_assert(sizeof(config) == 64);
    asm volatile("ldtilecfg %0" : : "m"(config));
  }
  static void release() { asm volatile("tilerelease"); }

  template <int kTile>
  static JAXMOE_INLINE void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  template <int kTile>
  static JAXMOE_INLINE void load(const void* memory, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2"
                 :
                 : "r"(memory), "r"(stride), "i"(kTile)
                 : "memory");
  }
  template <int kTile>
  static JAXMOE_INLINE void store(void* memory, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)"
                 :
                 : "r"(memory), "r"(stride), "i"(kTile)
                 : "memory");
  }
  template <int kProduct, int kRows, int kWeights>
  static JAXMOE_INLINE void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0"
                 :
                 : "i"(kProduct), "i"(kRows), "i"(kWeights));
  }
};

constexpr Kernels make_table() {
  Kernels table;
  fill_amx_kernels<AmxTiles>(table);
  return table;
}

}  // namespace

constexpr Kernels kAmxKernels = make_table();

}  // namespace jaxmoe::cpu
