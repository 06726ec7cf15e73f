// In place of csrc/common/cuda_stream.h: tensors are on the CPU, and so are the operators registered.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>

#include <cstdlib>

#include "common/check.h"

#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(library, key, m) _STABLE_TORCH_LIBRARY_IMPL(library, CPU, m, C10_UID)

namespace imagegen {

struct CudaScope {
  explicit CudaScope(const Tensor&) {}
  int multiprocessors() const { return 4; }
  bool runs_sm90a() const {
    const char* variable = std::getenv("SIM_ARCHITECTURE");
    return variable && std::atoi(variable) == 90;
  }
  cudaStream_t stream = nullptr;
};

inline void check_launch(const char* op, cudaError_t error) {
  IMAGEGEN_CHECK(error == cudaSuccess, op, ": the CUDA kernel did not start");
}

}  // namespace imagegen
