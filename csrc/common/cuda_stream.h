// Where a CUDA operator runs, for host files. The simulator in tests/cuda_sim puts its own file in place of this one.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <string>

#include "common/check.h"

// Lives in libtorch_cuda; weak, so that the library also loads beside a CPU build of torch.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace imagegen {

// Makes x's device the current one while in scope; stream is torch's current stream there.
class CudaScope {
 public:
  explicit CudaScope(const Tensor& x) : device_(x.get_device_index()), guard_(x.get_device_index()) {
    void* current = nullptr;
    IMAGEGEN_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &current) == AOTI_TORCH_SUCCESS,
                   "imagegen: torch names no current CUDA stream");
    stream = static_cast<cudaStream_t>(current);
  }

  int multiprocessors() const { return attribute(cudaDevAttrMultiProcessorCount); }
  // Whether the kernels of sm_90a run here: this library has them, and so has the device their instructions. Of such a
  // kernel's body another architecture compiles nothing: common/wgmma.cuh.
  bool runs_sm90a() const {
    static const bool built = std::string(IMAGEGEN_CUDA_ARCHITECTURES).find("90a") != std::string::npos;
    return built && attribute(cudaDevAttrComputeCapabilityMajor) == 9;
  }

  cudaStream_t stream;

 private:
  int attribute(cudaDeviceAttr which) const {
    int value = 0;
    IMAGEGEN_CHECK(cudaDeviceGetAttribute(&value, which, device_) == cudaSuccess,
                   "imagegen: CUDA does not know device ", device_);
    return value;
  }

  int device_;
  torch::stable::accelerator::DeviceGuard guard_;
};

inline void check_launch(const char* op, cudaError_t error) {
  IMAGEGEN_CHECK(error == cudaSuccess, op, ": the CUDA kernel did not start: ", cudaGetErrorString(error));
}

}  // namespace imagegen
