// A 64-bit hash of memory, to notice that a weight has changed. Reading a weight costs 9 of the 25 units that using it
// in transformed form does; a version counter would cost nothing but does not see writes through .data or numpy.
#pragma once
#include <cstdint>

#include "cpu_capability.h"

namespace imagegen {

IMAGEGEN_DECLARE_KERNEL(uint64_t fingerprint_kernel(const void* p, int64_t bytes))

}  // namespace imagegen
