// How many blocks of d there are in n, and n with the last of them whole; what launches are sized by.
#pragma once
#include <cstdint>

namespace imagegen::cuda {

constexpr int64_t ceil_div(int64_t n, int64_t d) {
  return (n + d - 1) / d;
}
constexpr int64_t round_up(int64_t n, int64_t d) {
  return ceil_div(n, d) * d;
}

}  // namespace imagegen::cuda
