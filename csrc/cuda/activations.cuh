// Activations of the layer in float32; formulas and sources are in jaxmoe/activations.py.
#ifndef JAXMOE_CSRC_CUDA_ACTIVATIONS_CUH_
#define JAXMOE_CSRC_CUDA_ACTIVATIONS_CUH_

#include "cuda/activations.h"

namespace jaxmoe::cuda {

// Within 2 ulp of the exact value where that matters; saturates to 0 and 1.
__device__ __forceinline__ float sigmoid(float x) { return __fdividef(1.0f, 1.0f + __expf(-x)); }
__device__ __forceinline__ float swish(float x, float alpha) { return x * sigmoid(alpha * x); }
// NaN stays NaN, as in the other implementations.
__device__ __forceinline__ float at_most(float x, float limit) { return x > limit ? limit : x; }
__device__ __forceinline__ float clip(float x, float limit) {
  return x > limit ? limit : (x < -limit ? -limit : x);
}
__device__ __forceinline__ float gelu(float x) {
  return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
}
__device__ __forceinline__ float gelu_tanh(float x) {
  return 0.5f * x * (1.0f + tanhf(0.79788456080286536f * (x + 0.044715f * x * x * x)));
}

// p: the activation's parameters of this expert.
__device__ __forceinline__ float swiglu(float gate, float up, const float (&p)[3]) {
  return swish(at_most(gate, p[2]), p[0]) * (clip(up, p[2]) + p[1]);
}

__device__ __forceinline__ float activate_gated(Activation activation, float gate, float up,
                                                const float (&p)[3]) {
  switch (activation) {
    case Activation::kSwigluStep:
      return at_most(swish(gate, 1.0f), p[0]) * clip(up, p[0]);
    case Activation::kGeglu:
      return gelu(gate) * up;
    case Activation::kGegluTanh:
      return gelu_tanh(gate) * up;
    case Activation::kSitu:
      return (p[0] * tanhf(gate / p[0]) * sigmoid(gate)) * (p[1] * tanhf(up / p[1]));
    default:
      return swiglu(gate, up, p);
  }
}

__device__ __forceinline__ float activate_plain(Activation activation, float x) {
  switch (activation) {
    case Activation::kRelu2: {
      const float positive = x < 0.0f ? 0.0f : x;
      return positive * positive;
    }
    case Activation::kSilu:
      return swish(x, 1.0f);
    case Activation::kGelu:
      return gelu(x);
    case Activation::kGeluTanh:
      return gelu_tanh(x);
    case Activation::kRelu:
      return x < 0.0f ? 0.0f : x;
    default:
      return x;
  }
}

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_CSRC_CUDA_ACTIVATIONS_CUH_
