// Copies of boxes of a tensor to shared memory by the copy engine of sm_90 and later (TMA): one thread asks, and a
// barrier tells everyone when the bytes are there. They are written through the proxy that wgmma reads through: no
// fence stands between. The simulator in tests/cuda_sim puts its own file in place of this one.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "common/copy_barrier.cuh"

namespace imagegen::cuda {

using TensorMap = CUtensorMap;

constexpr int kBoxColumns = 64;  // the 128 bytes along which boxes are swizzled

// What the engine has to know of a tensor of 16-bit elements: sizes and, in bytes, strides, innermost axis first, that
// of the innermost left out. Its boxes have kBoxColumns columns and `rows` rows, swizzled as Swizzle::bytes128, and are
// zero where they reach beyond the tensor. Addresses and strides: multiples of 16; no stride is 0.
inline cudaError_t make_tensor_map(TensorMap& map, const void* p, const int64_t (&sizes)[4],
                                   const int64_t (&strides)[3], int rows) {
  // A driver's function, asked for at run time: the library loads where there is no driver.
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
#if CUDART_VERSION >= 12050
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &found);
#endif
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  if (!encode) return cudaErrorNotSupported;
  cuuint64_t size[4], stride[3];
  for (int i = 0; i < 4; ++i) size[i] = static_cast<cuuint64_t>(sizes[i]);
  // The stride of an axis with one element may be anything: one that is certainly legal takes its place.
  for (int i = 0; i < 3; ++i)
    stride[i] = static_cast<cuuint64_t>(sizes[i + 1] > 1 ? strides[i] : 16 * ((sizes[0] + 7) / 8));
  const cuuint32_t box[4] = {kBoxColumns, static_cast<cuuint32_t>(rows), 1, 1}, step[4] = {1, 1, 1, 1};
  const CUresult result = encode(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(p), size, stride, box, step,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// The box that begins at this place of the tensor, to an address at a multiple of 1024.
__device__ __forceinline__ void copy_tensor(void* to, const TensorMap& map, int column, int row, int head, int batch,
                                            CopyBarrier& arrived) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4, %5}], "
      "[%6];" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(&map), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(arrived.at())
      : "memory");
}

}  // namespace imagegen::cuda
