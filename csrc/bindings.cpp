// What has no tensors: how this build was made and what it runs on. Importing the module registers the operators.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "common/conv_algorithm.h"
#include "common/cpu_capability.h"
#include "common/kept_memory.h"
#include "common/weight_cache.h"

#ifndef IMAGEGEN_CUDA_ARCHITECTURES
#define IMAGEGEN_CUDA_ARCHITECTURES ""
#endif

namespace {

using namespace imagegen;

std::vector<std::string> cpu_capabilities() {
  const int best = static_cast<int>(best_cpu_capability());
  return {kCpuCapabilityNames, kCpuCapabilityNames + best + 1};
}

void set_cpu_capability_by_name(const std::string& name) {
  for (int i = 0; i <= static_cast<int>(best_cpu_capability()); ++i)
    if (name == kCpuCapabilityNames[i]) return set_cpu_capability(static_cast<CpuCapability>(i));
  throw pybind11::value_error("cpu capability must be one this machine has, got '" + name + "'");
}

// By what algorithm an op convolves one image of cin channels to (cout, out_h, out_w).
std::string conv_algorithm(const std::string& op, int kernel, const std::string& dtype, int64_t cin, int64_t cout,
                           int64_t out_h, int64_t out_w) {
  constexpr const char* dtypes[] = {"float32", "float64", "bfloat16", "float16"};
  for (int i = 0; i < 4; ++i) {
    const ConvShape shape{static_cast<Dtype>(i), cin, cout, out_h, out_w};
    if (dtype != dtypes[i]) continue;
    if (op == "conv2d") return conv2d_algorithm_name(shape);
    if (op == "conv_transpose2d") return conv_transpose2d_algorithm_name(kernel, shape);
    if (op == "upsample_conv2d") return upsample_conv2d_algorithm_name(shape);
  }
  throw pybind11::value_error("no convolution '" + op + "' in '" + dtype + "'");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and CPU features; importing it registers the operators torch.ops.imagegen.*";
  m.def("compiler", [] { return std::string(__VERSION__); });
  m.def("torch_target", [] { return std::string("2.10"); }, "Oldest torch this build loads in.");
  m.def("cuda_architectures", [] { return std::string(IMAGEGEN_CUDA_ARCHITECTURES); });
  m.def("cpu_capabilities", &cpu_capabilities,
        "Instruction sets of this machine that kernels were built for, best last.");
  m.def("cpu_capability", [] { return kCpuCapabilityNames[static_cast<int>(cpu_capability())]; });
  m.def("cpu_is_intel", &cpu_is_intel);
  m.def("conv_algorithm", &conv_algorithm);
  m.def("output_cache_bytes", &kept_bytes);
  m.def("output_cache_limit", &kept_limit);
  m.def("set_output_cache_limit", &set_kept_limit);
  m.def("clear_output_cache", &clear_kept);
  m.def("weight_cache_bytes", &weight_cache_bytes);
  m.def("weight_cache_misses", &weight_cache_misses);
  m.def("weight_cache_limit", &weight_cache_limit);
  m.def("set_weight_cache_limit", &set_weight_cache_limit);
  m.def("clear_weight_cache", &clear_weight_cache);
  m.def("set_cpu_capability", &set_cpu_capability_by_name, "Run the kernels of this instruction set from now on.");
}
