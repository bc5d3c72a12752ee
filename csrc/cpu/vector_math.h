// f32 functions on vectors of Isa::kWidth lanes, branch-free, to about 1e-7 of the result.
//
// Written once with the compiler's vector types. Isa is a type in an unnamed namespace of the
// including translation unit, so that nothing compiled for one instruction set can be linked into
// another's code.
#ifndef JAXMOE_CSRC_CPU_VECTOR_MATH_H_
#define JAXMOE_CSRC_CPU_VECTOR_MATH_H_

#include <cstdint>
#include <cstring>

#define JAXMOE_INLINE inline __attribute__((always_inline))
#define JAXMOE_LAMBDA __attribute__((always_inline))

namespace jaxmoe::cpu {

// float and int32 vectors as the compiler knows them (__m512 and the like are the same types).
template <int kWidth>
struct VectorTypes {
  typedef float F __attribute__((vector_size(4 * kWidth)));
  typedef int32_t I __attribute__((vector_size(4 * kWidth)));
  typedef uint32_t U __attribute__((vector_size(4 * kWidth)));
  typedef uint16_t H __attribute__((vector_size(2 * kWidth)));
};

template <class Isa>
struct Math {
  using F = typename Isa::F;
  using I = typename Isa::I;

  static JAXMOE_INLINE F load(const float* p) {
    F v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  static JAXMOE_INLINE void store(float* p, F v) { std::memcpy(p, &v, sizeof(v)); }
  // Not 0 + x, which is another number for -0 and so an addition.
  static JAXMOE_INLINE F splat(float x) { return x - F{}; }
  static JAXMOE_INLINE I splat_int(int32_t x) { return I{} + x; }

  // Comparisons are false for NaN, so that a NaN in `x` stays.
  static JAXMOE_INLINE F at_most(F x, F limit) { return x > limit ? limit : x; }
  static JAXMOE_INLINE F at_least(F x, F limit) { return x < limit ? limit : x; }
  static JAXMOE_INLINE F clip(F x, F limit) { return at_least(at_most(x, limit), -limit); }
  static JAXMOE_INLINE F abs(F x) { return (F)((I)x & splat_int(0x7fffffff)); }
  static JAXMOE_INLINE F copy_sign(F magnitude, F sign) {
    const I mask = splat_int(0x7fffffff);
    return (F)(((I)magnitude & mask) | ((I)sign & ~mask));
  }

  // 2^n (1 + r + r^2 P(r)), |r| <= ln2 / 2; inf above 88.73, 0 below -104. P is a minimax fit
  // (error 8e-9).
  static JAXMOE_INLINE F exp(F x) {
    x = at_least(at_most(x, splat(89.0f)), splat(-104.0f));
    const F magic = splat(12582912.0f);  // 1.5 * 2^23: the sum's low bits are the rounded integer
    const F shifted = x * 1.44269504f + magic;
    const F n = shifted - magic;
    F r = x - n * 0.693359375f;  // ln 2 in two parts; n times the first is exact
    r = r - n * -2.12194440e-4f;
    F p = splat(1.3941123615950346e-3f);
    p = p * r + 8.363180793821812e-3f;
    p = p * r + 4.166637361049652e-2f;
    p = p * r + 1.6666576266288757e-1f;
    p = p * r + 0.5f;
    p = p * (r * r) + r + 1.0f;
    // Two factors, because 2^n itself may leave the range of f32.
    const I exponent = (I)shifted - (I)magic;
    const I half = exponent >> 1;
    return p * (F)((half + 127) << 23) * (F)((exponent - half + 127) << 23);
  }

  static JAXMOE_INLINE F sigmoid(F x) { return 1.0f / (1.0f + exp(-x)); }

  // x * sigmoid(slope * x): for large negative x the sigmoid is 0 and so is the product.
  static JAXMOE_INLINE F swish(F x, F slope) { return x * sigmoid(slope * x); }

  static JAXMOE_INLINE F tanh(F x) {
    const F z = x * x;
    F p = splat(-6.112979259341955e-3f);  // minimax fit of (tanh(x) / x - 1) / x^2 below 0.625
    p = p * z + 2.1009936928749084e-2f;
    p = p * z + -5.3854040801525116e-2f;
    p = p * z + 1.3332794606685638e-1f;
    p = p * z + -3.33333283662796e-1f;
    const F near = x + x * z * p;
    const F a = abs(x);
    const F far = copy_sign(1.0f - 2.0f / (exp(a + a) + 1.0f), x);
    return a < splat(0.625f) ? near : far;
  }

  // x Phi(x) = x / 2 erfc(-x / sqrt 2), with erfc(a) = exp(-a^2) t Q(t), t = 1 / (1 + a / 2), a >=
  // 0; minimax fit.
  static JAXMOE_INLINE F gelu(F x) {
    const F a = at_most(abs(x) * 0.70710678f, splat(20.0f));
    const F t = 1.0f / (1.0f + 0.5f * a);
    F q = splat(4.364644510858589e-2f);
    q = q * t + -2.3665477335453033e-1f;
    q = q * t + 4.968172311782837e-1f;
    q = q * t + -4.570488929748535e-1f;
    q = q * t + 1.3195158541202545e-1f;
    q = q * t + -5.790852382779121e-2f;
    q = q * t + 9.254240244626999e-2f;
    q = q * t + 1.756356954574585e-1f;
    q = q * t + 2.468249052762985e-1f;
    q = q * t + 2.820993363857269e-1f;
    q = q * t + 2.820945978164673e-1f;
    const F half_erfc = 0.5f * exp(-a * a) * t * q;
    return x * (x > splat(0.0f) ? 1.0f - half_erfc : half_erfc);
  }

  // x / 2 (1 + tanh u) = x sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3): no cancellation.
  static JAXMOE_INLINE F gelu_tanh(F x) {
    return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
  }
};

}  // namespace jaxmoe::cpu

#endif  // JAXMOE_CSRC_CPU_VECTOR_MATH_H_
