// What has no tensors: how this build was made and what it runs on. Importing the module registers the operators.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "common/cpu_capability.h"
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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build information and CPU features; importing it registers the operators torch.ops.imagegen.*";
  m.def("compiler", [] { return std::string(__VERSION__); });
  m.def("torch_target", [] { return std::string("2.10"); }, "Oldest torch this build loads in.");
  m.def("cuda_architectures", [] { return std::string(IMAGEGEN_CUDA_ARCHITECTURES); });
  m.def("cpu_capabilities", &cpu_capabilities,
        "Instruction sets of this machine that kernels were built for, best last.");
  m.def("cpu_capability", [] { return kCpuCapabilityNames[static_cast<int>(cpu_capability())]; });
  m.def("weight_cache_bytes", &weight_cache_bytes);
  m.def("weight_cache_misses", &weight_cache_misses);
  m.def("weight_cache_limit", &weight_cache_limit);
  m.def("set_weight_cache_limit", &set_weight_cache_limit);
  m.def("clear_weight_cache", &clear_weight_cache);
  m.def("set_cpu_capability", &set_cpu_capability_by_name, "Run the kernels of this instruction set from now on.");
}
