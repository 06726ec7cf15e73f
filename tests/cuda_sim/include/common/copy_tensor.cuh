// In place of csrc/common/copy_tensor.cuh: SIM_ASYNC says when a box lands, as soon as it is asked for or not before
// somebody waits for it.
#pragma once
#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "common/copy_barrier.cuh"

namespace imagegen::cuda {

constexpr int kBoxColumns = 64;

struct TensorMap {
  const char* p;
  int64_t sizes[4], strides[3];
  int rows;
};

// Refuses what the driver's would.
inline cudaError_t make_tensor_map(TensorMap& map, const void* p, const int64_t (&sizes)[4],
                                   const int64_t (&strides)[3], int rows) {
  bool legal = reinterpret_cast<uintptr_t>(p) % 16 == 0 && 0 < rows && rows <= 256;
  for (int i = 0; i < 3; ++i)
    legal &= sizes[i + 1] == 1 || (strides[i] % 16 == 0 && 0 < strides[i] && strides[i] < int64_t{1} << 40);
  for (int64_t size : sizes) legal &= 0 < size && size <= int64_t{1} << 32;
  if (!legal) return cudaErrorInvalidValue;
  map.p = static_cast<const char*>(p), map.rows = rows;
  std::memcpy(map.sizes, sizes, sizeof sizes), std::memcpy(map.strides, strides, sizeof strides);
  return cudaSuccess;
}

inline void copy_tensor(void* to, const TensorMap& map, int column, int row, int head, int batch,
                        CopyBarrier& arrived) {
  if (reinterpret_cast<uintptr_t>(to) % 1024) throw std::runtime_error("cuda_sim: a box copied to no multiple of 1024");
  const int64_t at[4] = {column, row, head, batch};
  cuda_sim::copy_barrier_copy(&arrived, to, map.rows * kBoxColumns * 2, [=] {
    for (int r = 0; r < map.rows; ++r)
      for (int c = 0; c < kBoxColumns; ++c) {
        const int64_t place[4] = {at[0] + c, at[1] + r, at[2], at[3]};
        const char* from = map.p + 2 * place[0];
        bool inside = 0 <= place[0] && place[0] < map.sizes[0];
        for (int i = 1; i < 4; ++i) {
          inside &= 0 <= place[i] && place[i] < map.sizes[i];
          from += place[i] * map.strides[i - 1];
        }
        char* const element = static_cast<char*>(to) + r * 128 + (c / 8 ^ r % 8) * 16 + c % 8 * 2;
        if (inside)
          std::memcpy(element, from, 2);
        else
          std::memset(element, 0, 2);
      }
  });
}

}  // namespace imagegen::cuda
