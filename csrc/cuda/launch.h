// One way to launch: with programmatic dependent launch, so that a kernel's start overlaps the end
// of the one before it. Every kernel lets its successor start at once (`grid_launch_dependents`),
// and then waits for its predecessor to end (`grid_wait`) before it reads or writes what others do:
// so a kernel that has ended had all of its predecessors end before.
#ifndef JAXMOE_CSRC_CUDA_LAUNCH_H_
#define JAXMOE_CSRC_CUDA_LAUNCH_H_

#include <cuda_runtime.h>

namespace jaxmoe::cuda {

template <class... Parameters, class... Args>
cudaError_t launch_clusters(void (*kernel)(Parameters...), int cluster, dim3 grid, int threads,
                            int smem_bytes, cudaStream_t stream, const Args&... args) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim.x = cluster;
  attributes[1].val.clusterDim.y = 1;
  attributes[1].val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = cluster > 1 ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

template <class... Parameters, class... Args>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, int threads, int smem_bytes,
                   cudaStream_t stream, const Args&... args) {
  return launch_clusters(kernel, 1, grid, threads, smem_bytes, stream, args...);
}

// All blocks run at once, so that they can wait for each other: an error where they do not fit.
// With `overlap` the start overlaps the end of the kernel before, as above.
template <class... Parameters, class... Args>
cudaError_t launch_cooperative(void (*kernel)(Parameters...), dim3 grid, int threads,
                               int smem_bytes, bool overlap, cudaStream_t stream,
                               const Args&... args) {
  cudaLaunchAttribute attributes[2]{};
  attributes[0].id = cudaLaunchAttributeCooperative;
  attributes[0].val.cooperative = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = smem_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = overlap ? 2 : 1;
  return cudaLaunchKernelEx(&config, kernel, args...);
}

}  // namespace jaxmoe::cuda

#endif  // JAXMOE_CSRC_CUDA_LAUNCH_H_
