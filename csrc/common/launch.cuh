// One spelling for a kernel launch and for its dynamic shared memory. The simulator in tests/cuda_sim puts its own file
// in place of this one.
#pragma once
#include <cuda_runtime.h>

namespace imagegen::cuda {

// In clusters of so many blocks, neighbours along x, where the grid has whole ones.
template <class... Parameters, class... Arguments>
cudaError_t launch_clusters(int blocks, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                            cudaStream_t stream, Arguments&&... arguments) {
  if (shared_bytes > 48 << 10) {  // more than every block may have: this kernel says so first
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  config.attrs = &cluster, config.numAttrs = blocks > 1;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments&&... arguments) {
  return launch_clusters(1, kernel, grid, block, shared_bytes, stream, arguments...);
}

// The block's dynamic shared memory, aligned as bulk copies and wgmma want it.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char memory[];
  return reinterpret_cast<T*>(memory);
}

}  // namespace imagegen::cuda
