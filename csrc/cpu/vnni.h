// Integer dot products of four bytes (VNNI) for kernel_fixed.h, in either width.
#ifndef JAXMOE_CSRC_CPU_VNNI_H_
#define JAXMOE_CSRC_CPU_VNNI_H_

#include "cpu/kernel_fixed.h"

namespace jaxmoe::cpu {
namespace {

// Base provides Weights and load_weights, broadcast_four, and dpbusd(sums, weights, four bytes).
template <class Base>
struct WithVnni : Base {
  using I = typename Base::I;
  using U = typename VectorTypes<Base::kWidth>::U;
  using Weights = typename Base::Weights;
  static constexpr int kVectorsTogether = 2;

  static JAXMOE_INLINE void dot(const Weights (&weights)[2], const FixedBlock& x, I (&sums)[2]) {
    I sum0 = {}, sum1 = {};
    add(weights, x.high, sum0, sum1);
    const U correction = U{} + static_cast<uint32_t>(x.correction);  // wraps where x has a NaN
    sum0 = (I)(((U)sum0 << 8) + correction);
    sum1 = (I)(((U)sum1 << 8) + correction);
    add(weights, x.low, sum0, sum1);
    sums[0] = sum0;
    sums[1] = sum1;
  }

  static JAXMOE_INLINE void dot(const Weights (&weights)[2], const Int8Block& x, I (&sums)[2]) {
    I sum0 = I{} + x.start, sum1 = sum0;
    add(weights, x.values, sum0, sum1);
    sums[0] = sum0;
    sums[1] = sum1;
  }

 private:
  static JAXMOE_INLINE void add(const Weights (&weights)[2], const int8_t* bytes, I& sum0,
                                I& sum1) {
    // Sixteen registers are too few to keep the broadcasts for the next vectors of lanes; loading
    // them again costs less than what is spilled otherwise.
    if constexpr (Base::kWidth == 8) asm volatile("" : "+r"(bytes));
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const auto four = Base::broadcast_four(bytes + 4 * i);
      sum0 = Base::dpbusd(sum0, weights[0].of[i], four);
      sum1 = Base::dpbusd(sum1, weights[1].of[i], four);
    }
  }
};

}  // namespace
}  // namespace jaxmoe::cpu

#endif  // JAXMOE_CSRC_CPU_VNNI_H_
