// Memory formats: every op returns the format of its input. The rule is the one of imagegen/ops/_layout.py.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <vector>

#include "common/output_cache.h"

namespace imagegen {

inline bool is_channels_last(const torch::stable::Tensor& x) {
  return x.dim() == 4 && x.size(1) > 1 && x.stride(1) == 1 && !x.is_contiguous();
}

// An uninitialised tensor of x's dtype and device.
inline torch::stable::Tensor new_empty_4d(const torch::stable::Tensor& x, const std::vector<int64_t>& size,
                                          bool channels_last) {
  using torch::headeronly::MemoryFormat;
  if (x.is_cpu()) return new_output(x, size, x.scalar_type(), channels_last);
  return torch::stable::empty(size, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                              channels_last ? MemoryFormat::ChannelsLast : MemoryFormat::Contiguous);
}

}  // namespace imagegen
