// Refuses to be compiled for a target that lacks the matrix instructions of the Blackwell kernels.
#ifndef JAXMOE_CSRC_BLACKWELL_TARGET_CUH_
#define JAXMOE_CSRC_BLACKWELL_TARGET_CUH_

// The family's features come with `sm_120f` or `sm_120a`, not with `sm_120`: kernels for the latter
// compile, and then compute nothing.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 && !defined(__CUDA_ARCH_SPECIFIC__) && \
    !defined(__CUDA_ARCH_FAMILY_SPECIFIC__)
#error \
    "block-scaled products need a family target: -gencode=arch=compute_120f,code=sm_120f (or 100f)"
#endif

#endif  // JAXMOE_CSRC_BLACKWELL_TARGET_CUH_
