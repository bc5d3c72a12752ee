// One way to launch: from SM 90 on with programmatic dependent launch, so that a kernel's start
// overlaps the end of the one before it. Every kernel lets its successor start at once
// (`grid_launch_dependents`), and then waits for its predecessor to end (`grid_wait`) before it
// reads or writes what others do: so a kernel that has ended had all of its predecessors end
// before.
#ifndef JAXMOE_CSRC_CUDA_LAUNCH_H_
#define JAXMOE_CSRC_CUDA_LAUNCH_H_

#include <cuda_runtime.h>

namespace jaxmoe::cuda {

inline cudaError_t has_programmatic_launch(bool* has) {
  int device = 0, major = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  }
  *has = major >= 9;
  return error;
}

// `more`: an attribute beside the one that every launch has; null for none.
template <class... Parameters, class... Args>
cudaError_t launch_with(const cudaLaunchAttribute* more, void (*kernel)(Parameters...), dim3 grid,
                        int threads, int smem_bytes, cudaStream_t stream, const Args&... args) {
  bool programmatic = false;
  const cudaError_t error = has_programmatic_launch(&programmatic);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2]{};
  int count = 0;
  if (programmatic) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (more) attributes[count++] = *more;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

template <class... Parameters, class... Args>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, int smem_bytes,
                   cudaStream_t stream, const Args&... args) {
  return launch_with(nullptr, kernel, grid, threads, smem_bytes, stream, args...);
}

template <class... Parameters, class... Args>
cudaError_t launch_clusters(void (*kernel)(Parameters...), int cluster, dim3 grid, int threads,
                            int smem_bytes, cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute size{};
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim.x = cluster;
  size.val.clusterDim.y = 1;
  size.val.clusterDim.z = 1;
  return launch_with(cluster > 1 ? &size : nullptr, kernel, grid, threads, smem_bytes, stream,
                     args...);
}

// All blocks run at once, so that they can wait for each other: an error where they do not fit.
template <class... Parameters, class... Args>
cudaError_t launch_cooperative(void (*kernel)(Parameters...), dim3 grid, int threads,
                               int smem_bytes, cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute together{};
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  return launch_with(&together, kernel, grid, threads, smem_bytes, stream, args...);
}

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_CSRC_CUDA_LAUNCH_H_
