// Memory on huge pages: fresh memory otherwise costs 12 ms per 33 MB in page faults (2 ms with them), and packed
// weights on 4 KB pages cost 8 % in TLB misses.
#pragma once
#include <cstddef>

namespace imagegen {

// Asks for huge pages under memory somebody else allocated and nobody has touched yet. A hint: never fails.
void advise_huge(void* p, size_t bytes);

// Pages huge pages in one after the other, for an output whose every page all threads write to from the start: two
// threads that fault at once took 19 ms for 33 MB, one alone 2.5 ms. Many threads clear pages faster than one and are
// left to it. Writes to the memory.
void page_in(void* p, size_t bytes);

// What the machine has, or 2 GB if it does not say.
size_t machine_memory();

// Uninitialised memory, 64-byte aligned, on huge pages where it is large.
void* allocate(size_t bytes);
void release(void* p, size_t bytes);

// Uninitialised memory in whole pages, straight from the system and on huge pages where it is large; any whole pages of
// it may go back by themselves.
size_t whole_pages(size_t bytes);
void* map_memory(size_t bytes);
void unmap_memory(void* p, size_t bytes);

// This thread's scratch memory: grows, is reused by every kernel, and is freed with the thread.
void* workspace(size_t bytes);

}  // namespace imagegen
