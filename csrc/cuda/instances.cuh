// Instantiates one tactic for some formats: `Config<T, format, epilogue>` names a configuration of
// a kernel and `Run` launches it.
#ifndef JAXMOE_CSRC_CUDA_INSTANCES_CUH_
#define JAXMOE_CSRC_CUDA_INSTANCES_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>

#include "cuda/tactics.h"

namespace jaxmoe::cuda {

template <template <class, Format, Epilogue> class Config, class Run, class Args,
          Format... kFormats>
struct Instances {
#ifdef JAXMOE_FEW_INSTANCES  // one kernel for each tactic, to check that they compile
  static cudaError_t run(const Args& args, const Launch& launch) {
    constexpr Format kFormat[] = {kFormats...};
    return Run::template run<Config<__nv_bfloat16, kFormat[0], Epilogue::kSwiglu>>(args, launch);
  }
#else
  template <class T, Format kFormat>
  static cudaError_t epilogue(const Args& args, const Launch& launch) {
    switch (launch.epilogue) {
      case Epilogue::kStore:
        return Run::template run<Config<T, kFormat, Epilogue::kStore>>(args, launch);
      case Epilogue::kPlain:
        return Run::template run<Config<T, kFormat, Epilogue::kPlain>>(args, launch);
      case Epilogue::kGated:
        return Run::template run<Config<T, kFormat, Epilogue::kGated>>(args, launch);
      case Epilogue::kSwiglu:
        return Run::template run<Config<T, kFormat, Epilogue::kSwiglu>>(args, launch);
    }
    return cudaErrorInvalidValue;
  }
  template <class T>
  static cudaError_t format(const Args& args, const Launch& launch) {
    cudaError_t error = cudaErrorInvalidValue;
    ((launch.format == kFormats && (error = epilogue<T, kFormats>(args, launch), true)) || ...);
    return error;
  }
  static cudaError_t run(const Args& args, const Launch& launch) {
    return launch.dtype == Dtype::kBf16 ? format<__nv_bfloat16>(args, launch)
                                        : format<__half>(args, launch);
  }
#endif
  // The two epilogues differ in the shape of a strip's results. 0: this tactic has no kernel.
  template <Format kFormat>
  static constexpr int smem_of() {
    return std::max(Config<__nv_bfloat16, kFormat, Epilogue::kStore>::smem_bytes(kMaxExperts),
                    Config<__nv_bfloat16, kFormat, Epilogue::kSwiglu>::smem_bytes(kMaxExperts));
  }
  static constexpr int smem_bytes(Format format) {
    int bytes = 0;
    ((format == kFormats && (bytes = smem_of<kFormats>(), true)) || ...);
    return bytes;
  }
};

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_CSRC_CUDA_INSTANCES_CUH_
