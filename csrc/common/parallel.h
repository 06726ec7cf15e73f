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

}  // namespace imagegen::IMAGEGEN_CAPABILITY
#endif
