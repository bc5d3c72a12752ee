// The layer's activations, as the CPU library names them.
#ifndef JAXMOE_CSRC_CUDA_ACTIVATIONS_H_
#define JAXMOE_CSRC_CUDA_ACTIVATIONS_H_

namespace jaxmoe::cuda {

enum class Activation {
  kSwiglu,
  kSwigluStep,
  kGeglu,
  kGegluTanh,
  kSitu,
  kRelu2,
  kSilu,
  kGelu,
  kGeluTanh,
  kRelu,
  kIdentity,
};

constexpr bool is_gated(Activation a) { return a <= Activation::kSitu; }

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_CSRC_CUDA_ACTIVATIONS_H_
