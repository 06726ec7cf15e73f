#include "output_cache.h"

#include <torch/csrc/stable/ops.h>

#include <algorithm>

#include "kept_memory.h"
#include "memory.h"

// Of torch 2.11; an older one leaves it null, and outputs stay where they are.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* made, int32_t layout, const uint8_t* metadata,
    int64_t metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace imagegen {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;

struct Geometry {
  int64_t dims;
  const int64_t *size, *stride;
  ScalarType dtype;

  int32_t dtype_code() const { return to<int32_t>(from(dtype)); }
};

bool keeps(size_t bytes) {
  return bytes >= kSmallestKept && torch_from_blob && kept_limit() != 0;
}

void give_back_output(void* p, void* context) {
  give_back({p, reinterpret_cast<size_t>(context)});
}

Tensor make_kept(const Geometry& g, size_t bytes) {
  const KeptBlock block = take_kept(bytes);
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(torch_from_blob(block.p, g.dims, g.size, g.stride, 0, g.dtype_code(),
                                         aoti_torch_device_type_cpu(), -1, &made, aoti_torch_layout_strided(), nullptr,
                                         0, &give_back_output, reinterpret_cast<void*>(block.bytes)));
  return Tensor(made);
}

// Memory of torch's own: a large one pages in faster so.
Tensor prepared(Tensor t, size_t bytes) {
  advise_huge(t.mutable_data_ptr(), bytes);
  page_in(t.mutable_data_ptr(), bytes);
  return t;
}

}  // namespace

Tensor in_kept_memory(Tensor t) {
  const size_t bytes = t.numel() * t.element_size();
  if (bytes < kSmallestKept) return t;
  if (!keeps(bytes)) return prepared(t, bytes);
  return make_kept({t.dim(), t.sizes().data(), t.strides().data(), t.scalar_type()}, bytes);
}

Tensor new_output(const Tensor& x, const std::vector<int64_t>& size, ScalarType dtype, bool channels_last) {
  const int64_t dims = size.size();
  std::vector<int64_t> stride(dims);
  int64_t dense = 1;
  for (int64_t i = 0; i < dims; ++i) {
    const int64_t d = !channels_last ? dims - 1 - i : i == 0 ? 1 : i == dims - 1 ? 0 : dims - i;  // innermost first
    stride[d] = dense, dense *= std::max<int64_t>(size[d], 1);
  }
  const Geometry g{dims, size.data(), stride.data(), dtype};
  const size_t bytes = dense * aoti_torch_dtype_element_size(g.dtype_code());
  if (keeps(bytes)) return make_kept(g, bytes);
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dims, g.size, g.stride, g.dtype_code(), aoti_torch_device_type_cpu(),
                                                  x.get_device_index(), &made));
  return bytes < kSmallestKept ? Tensor(made) : prepared(Tensor(made), bytes);
}

}  // namespace imagegen
