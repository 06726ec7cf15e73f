// torch's intra-op threads for kernel files, which see no torch header.
#pragma once
#include <cstdint>

namespace imagegen {

using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);

// Splits [0, n) into at most one contiguous piece per thread, none shorter than grain.
void parallel_for(int64_t n, int64_t grain, ParallelBody body, void* context);
int64_t num_threads();

}  // namespace imagegen

#ifdef IMAGEGEN_CAPABILITY
namespace imagegen::IMAGEGEN_CAPABILITY {

template <class F>
static inline void parallel_for(int64_t n, int64_t grain, const F& f) {
  imagegen::parallel_for(
      n, grain, [](int64_t begin, int64_t end, void* context) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// Hands out [0, n) one by one to whichever thread is free: body(claim) runs once per thread and calls claim() until it
// returns n. A core that is slower than its neighbours, or busy with something else, then holds nobody up.
template <class F>
static inline void parallel_claim(int64_t n, const F& body) {
  int64_t next = 0;
  const int64_t threads = num_threads() < n ? num_threads() : n;
  parallel_for(threads, 1, [&](int64_t, int64_t) {
    body([&] {
      const int64_t item = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      return item < n ? item : n;
    });
  });
}

}  // namespace imagegen::IMAGEGEN_CAPABILITY
#endif
