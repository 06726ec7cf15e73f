// The memory of large CPU outputs: that of outputs that are gone, which torch would give back to the system at once.
#pragma once
#include <torch/csrc/stable/tensor.h>

namespace imagegen {

// t, which nobody has written to yet, in kept memory if it is large: the same shape, strides and dtype. Its storage
// returns to the cache when torch lets go of it, from whatever thread.
torch::stable::Tensor in_kept_memory(torch::stable::Tensor t);

}  // namespace imagegen
