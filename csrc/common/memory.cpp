#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <new>

#include "parallel.h"

namespace imagegen {
namespace {

// kPage: a whole number of pages on every system.
constexpr size_t kPage = size_t{64} << 10, kHugePage = size_t{2} << 20;

struct Workspace {
  void* p = nullptr;
  size_t bytes = 0;
  ~Workspace() { release(p, bytes); }
};

}  // namespace

void advise_huge(void* p, size_t bytes) {
#ifdef MADV_HUGEPAGE
  if (bytes < 2 * kHugePage) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(p) + 4095) & ~uintptr_t{4095};
  const uintptr_t end = (reinterpret_cast<uintptr_t>(p) + bytes) & ~uintptr_t{4095};
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

void page_in(void* p, size_t bytes) {
  constexpr int64_t kFewThreads = 4;
  if (bytes < 2 * kHugePage || num_threads() > kFewThreads) return;
  for (size_t i = 0; i < bytes; i += kHugePage) static_cast<volatile char*>(p)[i] = 0;
}

size_t machine_memory() {
  const long pages = sysconf(_SC_PHYS_PAGES), bytes = sysconf(_SC_PAGESIZE);
  return pages > 0 && bytes > 0 ? size_t(pages) * size_t(bytes) : size_t{2} << 30;
}

void* allocate(size_t bytes) {
  const size_t alignment = bytes >= kHugePage ? kHugePage : 64;
  void* p = nullptr;
  if (posix_memalign(&p, alignment, bytes ? bytes : 64) != 0) throw std::bad_alloc();
  advise_huge(p, bytes);
  return p;
}

void release(void* p, size_t) {
  free(p);
}

size_t whole_pages(size_t bytes) {
  return (bytes + kPage - 1) / kPage * kPage;
}

void* map_memory(size_t bytes) {
  const size_t slack = bytes >= 2 * kHugePage ? kHugePage : 0;  // to begin on a huge page
  void* const mapped = mmap(nullptr, bytes + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) throw std::bad_alloc();
  char* const begin = static_cast<char*>(mapped);
  const size_t before = slack ? (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage : 0;
  unmap_memory(begin, before);
  unmap_memory(begin + before + bytes, slack - before);
  advise_huge(begin + before, bytes);
  return begin + before;
}

void unmap_memory(void* p, size_t bytes) {
  if (bytes) munmap(p, bytes);
}

void* workspace(size_t bytes) {
  static thread_local Workspace w;
  if (bytes > w.bytes) {
    release(w.p, w.bytes);
    w.p = nullptr;
    w.bytes = 0;
    w.p = allocate(bytes);
    w.bytes = bytes;
  }
  return w.p;
}

}  // namespace imagegen
