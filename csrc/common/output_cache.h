// The memory of large outputs that are gone, kept for the next ones.
//
// torch gives the memory of a large tensor back to the system at once, and the next tensor gets fresh pages, which the
// system clears as they are first written to: 20 ms for 33 MB in a virtual machine (2.5 ms on huge pages), where
// normalising takes 3 ms and convolving 36. Memory that is kept is paged in already, on huge pages.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <cstddef>

namespace imagegen {

// t, which nobody has written to yet, in kept memory if it is large: the same shape, strides and dtype. Its storage
// returns to the cache when torch lets go of it, from whatever thread.
torch::stable::Tensor in_kept_memory(torch::stable::Tensor t);

size_t output_cache_bytes();
// A sixteenth of the machine's memory unless set otherwise. What was not used for longest goes first; with 0 outputs
// stay in torch's memory.
size_t output_cache_limit();
void set_output_cache_limit(size_t bytes);
void clear_output_cache();

}  // namespace imagegen
