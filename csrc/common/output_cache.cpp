#include "output_cache.h"

#include <torch/csrc/stable/ops.h>

#include "kept_memory.h"
#include "memory.h"

// Of torch 2.11; an older one leaves it null, and outputs stay where they are.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* made, int32_t layout, const uint8_t* metadata,
    int64_t metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace imagegen {
namespace {

void give_back_output(void* p, void* context) {
  give_back({p, reinterpret_cast<size_t>(context)});
}

}  // namespace

torch::stable::Tensor in_kept_memory(torch::stable::Tensor t) {
  const size_t bytes = t.numel() * t.element_size();
  if (bytes < kSmallestKept) return t;
  if (!torch_from_blob || kept_limit() == 0) {
    advise_huge(t.mutable_data_ptr(), bytes);
    page_in(t.mutable_data_ptr(), bytes);
    return t;
  }
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const KeptBlock block = take_kept(bytes);
  AtenTensorHandle made;
  TORCH_ERROR_CODE_CHECK(torch_from_blob(block.p, t.dim(), t.sizes().data(), t.strides().data(), 0,
                                         to<int32_t>(from(t.scalar_type())), aoti_torch_device_type_cpu(), -1, &made,
                                         aoti_torch_layout_strided(), nullptr, 0, &give_back_output,
                                         reinterpret_cast<void*>(block.bytes)));
  return torch::stable::Tensor(made);
}

}  // namespace imagegen
