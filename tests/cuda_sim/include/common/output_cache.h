// In place of csrc/common/output_cache.h: the simulator's outputs are where torch puts them.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace imagegen {

inline torch::stable::Tensor in_kept_memory(torch::stable::Tensor t) {
  return t;
}

inline torch::stable::Tensor new_output(const torch::stable::Tensor&, const std::vector<int64_t>& size,
                                        torch::headeronly::ScalarType dtype, bool channels_last) {
  using torch::headeronly::MemoryFormat;
  return torch::stable::empty(size, dtype, std::nullopt, std::nullopt, std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

}  // namespace imagegen
