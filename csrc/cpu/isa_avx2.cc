// cpu_avx2: f32 lanes and byte multiplies.
#include "cpu/isa_avx2.h"

namespace jaxmoe::cpu {
namespace {

struct BytesIsa : Isa {
  static constexpr int kVectorsTogether = 1;
  static constexpr int kMaxFixedRows = 16;

  static JAXMOE_INLINE void dot(const Weights (&weights)[1], const FixedBlock& x, I (&sums)[1]) {
    const __m256i high = _mm256_slli_epi32(dot_bytes(weights[0], x.high), 8);
    const __m256i low =
        _mm256_add_epi32(dot_bytes(weights[0], x.low), _mm256_set1_epi32(x.correction));
    sums[0] = (I)_mm256_add_epi32(high, low);
  }

  static JAXMOE_INLINE void dot(const Weights (&weights)[1], const Int8Block& x, I (&sums)[1]) {
    sums[0] = (I)_mm256_add_epi32(dot_bytes(weights[0], x.values), _mm256_set1_epi32(x.start));
  }

  // Four sums of pairs stay within 16 bits: 4 * 2 * 24 * 128 < 2^15.
  static JAXMOE_INLINE __m256i dot_bytes(const Weights& weights, const int8_t* bytes) {
    // Sixteen registers are too few to keep the broadcasts for the next vector of lanes; loading
    // them again costs less than what is spilled otherwise.
    asm volatile("" : "+r"(bytes));
    __m256i sum = _mm256_setzero_si256();
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const __m256i products = _mm256_maddubs_epi16(weights.of[i], broadcast_four(bytes + 4 * i));
      sum = _mm256_add_epi16(sum, products);
    }
    return _mm256_madd_epi16(sum, _mm256_set1_epi16(1));
  }
};

constexpr Kernels make_table() {
  Kernels table;
  fill_f32<Isa>(table);
  fill_fixed<BytesIsa>(table);
  fill_int8<BytesIsa>(table);
  return table;
}

}  // namespace

constexpr Kernels kAvx2Kernels = make_table();

}  // namespace jaxmoe::cpu
