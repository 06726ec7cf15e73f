// Large blocks of memory that are gone, kept for the next ones.
//
// Fresh pages cost microseconds each in a virtual machine (20 ms for 33 MB, 2.5 ms on huge pages), where normalising as
// much takes 3 ms and convolving 36. Memory that is kept is paged in already; from 4 MB on, on huge pages.
#pragma once
#include <cstddef>

namespace imagegen {

struct KeptBlock {
  void* p;
  size_t bytes;  // at least those asked for
};

// The smallest kept range that is large enough, cut to size, or a fresh one. Kept neighbours join, so that what served
// many small outputs serves a large one next, and before memory is mapped as much is freed as keeps the whole (in use
// and kept) within the most that was ever in use: keeping costs no more memory than not keeping would have taken at its
// peak. Below 1 MB malloc keeps memory by itself.
KeptBlock take_kept(size_t bytes);
void give_back(KeptBlock block);
constexpr size_t kSmallestKept = size_t{1} << 20;

size_t kept_bytes();
// A sixteenth of the machine's memory unless set otherwise. What was not used for longest goes first; with 0 nothing is
// kept.
size_t kept_limit();
void set_kept_limit(size_t bytes);
void clear_kept();

}  // namespace imagegen
