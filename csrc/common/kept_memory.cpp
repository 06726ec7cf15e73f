#include "kept_memory.h"

#include <mutex>
#include <vector>

#include "memory.h"

namespace imagegen {
namespace {

struct Kept {
  std::mutex mutex;
  std::vector<KeptBlock> free;  // longest unused first
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

Kept& kept() {
  static Kept* const k = new Kept;  // outlives every tensor
  return *k;
}

}  // namespace

KeptBlock take_kept(size_t bytes) {
  if (bytes < kSmallestKept) return {allocate(bytes), bytes};
  Kept& k = kept();
  {
    const std::lock_guard lock(k.mutex);
    auto best = k.free.end();
    for (auto block = k.free.begin(); block != k.free.end(); ++block)
      if (block->bytes >= bytes && block->bytes <= bytes + bytes / 4 &&
          (best == k.free.end() || block->bytes < best->bytes))
        best = block;
    if (best != k.free.end()) {
      const KeptBlock block = *best;
      k.free.erase(best);
      k.bytes -= block.bytes;
      return block;
    }
  }
  const KeptBlock block{allocate(bytes), bytes};
  page_in(block.p, bytes);
  return block;
}

void give_back(KeptBlock block) {
  if (block.bytes < kSmallestKept) return release(block.p, block.bytes);
  Kept& k = kept();
  const std::lock_guard lock(k.mutex);
  k.free.push_back(block);
  k.bytes += block.bytes;
  k.shrink(k.limit);
}

size_t kept_bytes() {
  const std::lock_guard lock(kept().mutex);
  return kept().bytes;
}

size_t kept_limit() {
  const std::lock_guard lock(kept().mutex);
  return kept().limit;
}

void set_kept_limit(size_t bytes) {
  const std::lock_guard lock(kept().mutex);
  kept().limit = bytes;
  kept().shrink(bytes);
}

void clear_kept() {
  const std::lock_guard lock(kept().mutex);
  kept().shrink(0);
}

}  // namespace imagegen
