// How the backward of attention is cut on CPU: by the shape alone, so that any number of threads sums alike.
#pragma once
#include "ops/attention.h"

namespace imagegen {

// Few heads are cut along their keys too, each part with its own sum of dq, so that every thread has work.
inline int64_t attention_backward_parts(const AttentionParams& p) {
  constexpr int64_t kItems = 8, kFewestKeys = 128;
  const int64_t heads = p.batch * p.kv_heads, wanted = heads > 0 ? (kItems + heads - 1) / heads : 1;
  const int64_t most = (p.k_len + kFewestKeys - 1) / kFewestKeys;
  return wanted < most ? wanted : most > 1 ? most : 1;
}

}  // namespace imagegen
