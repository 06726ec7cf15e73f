// The memory of large CPU outputs: that of outputs that are gone, which torch would give back to the system at once.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <vector>

namespace imagegen {

// t, which nobody has written to yet, in kept memory if it is large: the same shape, strides and dtype. Its storage
// returns to the cache when torch lets go of it, from whatever thread.
torch::stable::Tensor in_kept_memory(torch::stable::Tensor t);

// An uninitialised CPU tensor like x but for size and dtype, contiguous or channels_last, in kept memory if it is
// large. torch::stable::empty looks its operator up by name, which takes a microsecond, and ten where the caches have
// forgotten that code; aoti_torch_aten_new_empty takes twice as long as what is called here.
torch::stable::Tensor new_output(const torch::stable::Tensor& x, const std::vector<int64_t>& size,
                                 torch::headeronly::ScalarType dtype, bool channels_last);

}  // namespace imagegen
