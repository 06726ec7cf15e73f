// In place of csrc/common/launch.cuh: a launch runs the grid here, before it returns.
#pragma once
#include "cuda_sim.h"

namespace imagegen::cuda {

template <class... Parameters, class... Arguments>
cudaError_t launch_clusters(int blocks, void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
                            cudaStream_t, Arguments&&... arguments) {
  cuda_sim::run(grid, block, shared_bytes, [&] { kernel(Parameters(arguments)...); }, blocks);
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                   Arguments&&... arguments) {
  return launch_clusters(1, kernel, grid, block, shared_bytes, stream, arguments...);
}

template <class T>
T* dynamic_shared() {
  return static_cast<T*>(cuda_sim::dynamic_shared());
}

}  // namespace imagegen::cuda
