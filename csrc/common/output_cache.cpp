#include "output_cache.h"

#include <torch/csrc/stable/ops.h>

#include <mutex>
#include <vector>

#include "memory.h"

// Of torch 2.11; an older one leaves it null, and outputs stay where they are.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t offset, int32_t dtype,
    int32_t device_type, int32_t device_index, AtenTensorHandle* made, int32_t layout, const uint8_t* metadata,
    int64_t metadata_size, void (*deleter)(void* data, void* context), void* context);

namespace imagegen {
namespace {

// Smaller ones come from memory that malloc keeps by itself.
constexpr size_t kLarge = size_t{4} << 20;

struct Block {
  void* p;
  size_t bytes;
};

struct OutputCache {
  std::mutex mutex;
  std::vector<Block> free;  // longest unused first
  size_t bytes = 0;
  size_t limit = machine_memory() / 16;

  void shrink(size_t most) {
    while (bytes > most) {
      release(free.front().p, free.front().bytes);
      bytes -= free.front().bytes;
      free.erase(free.begin());
    }
  }
};

OutputCache& cache() {
  static OutputCache* const c = new OutputCache;  // outlives every tensor
  return *c;
}

// The smallest kept block that is large enough and at most a quarter too large, or a fresh one.
Block take(size_t bytes) {
  OutputCache& c = cache();
  {
    const std::lock_guard lock(c.mutex);
    auto best = c.free.end();
    for (auto block = c.free.begin(); block != c.free.end(); ++block)
      if (block->bytes >= bytes && block->bytes <= bytes + bytes / 4 &&
          (best == c.free.end() || block->bytes < best->bytes))
        best = block;
    if (best != c.free.end()) {
      const Block block = *best;
      c.free.erase(best);
      c.bytes -= block.bytes;
      return block;
    }
  }
  const Block block{allocate(bytes), bytes};
  page_in(block.p, bytes);
  return block;
}

void give_back(void* p, void* context) {
  const Block block{p, reinterpret_cast<size_t>(context)};
  OutputCache& c = cache();
  const std::lock_guard lock(c.mutex);
  c.free.push_back(block);
  c.bytes += block.bytes;
  c.shrink(c.limit);
}

}  // namespace

torch::stable::Tensor in_kept_memory(torch::stable::Tensor t) {
  const size_t bytes = t.numel() * t.element_size();
  if (bytes < kLarge) return t;
  if (!torch_from_blob || output_cache_limit() == 0) {
    advise_huge(t.mutable_data_ptr(), bytes);
    page_in(t.mutable_data_ptr(), bytes);
    return t;
  }
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  const Block block = take(bytes);
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(block.p, t.dim(), t.sizes().data(), t.strides().data(), 0,
                                                to<int32_t>(from(t.scalar_type())), aoti_torch_device_type_cpu(), -1,
                                                &made, aoti_torch_layout_strided(), nullptr, 0, &give_back,
                                                reinterpret_cast<void*>(block.bytes)));
  return torch::stable::Tensor(made);
}

size_t output_cache_bytes() {
  const std::lock_guard lock(cache().mutex);
  return cache().bytes;
}

size_t output_cache_limit() {
  const std::lock_guard lock(cache().mutex);
  return cache().limit;
}

void set_output_cache_limit(size_t bytes) {
  const std::lock_guard lock(cache().mutex);
  cache().limit = bytes;
  cache().shrink(bytes);
}

void clear_output_cache() {
  const std::lock_guard lock(cache().mutex);
  cache().shrink(0);
}

}  // namespace imagegen
