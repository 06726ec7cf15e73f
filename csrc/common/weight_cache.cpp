#include "weight_cache.h"

#include <list>
#include <mutex>

namespace imagegen {
namespace {

struct Entry {
  WeightKey key;
  uint64_t fingerprint;
  std::shared_ptr<PackedWeight> packed;
};

// Models have a handful of these layers (three in a Stable Diffusion UNet: 370 MB), so a list, latest first, is enough.
struct Cache {
  std::mutex mutex;
  std::list<Entry> entries;
  size_t bytes = 0, limit = size_t{1} << 30;

  void erase(std::list<Entry>::iterator entry) {
    bytes -= entry->packed->bytes;
    entries.erase(entry);
  }
  void shrink(size_t target) {
    while (bytes > target) erase(std::prev(entries.end()));
  }
};

// Never destroyed: threads may still run when the process ends.
Cache& cache() {
  static Cache& c = *new Cache;
  return c;
}

}  // namespace

std::shared_ptr<PackedWeight> packed_weight(const WeightKey& key, uint64_t fingerprint, size_t bytes,
                                            const std::function<void(void*)>& pack) {
  Cache& c = cache();
  std::shared_ptr<PackedWeight> packed;
  {
    const std::lock_guard lock(c.mutex);
    for (auto entry = c.entries.begin(); entry != c.entries.end(); ++entry) {
      if (!(entry->key == key)) continue;
      if (entry->fingerprint == fingerprint) {
        c.entries.splice(c.entries.begin(), c.entries, entry);
        return entry->packed;
      }
      // Outdated: its memory, already paged in, serves again unless another thread still reads it.
      if (entry->packed.use_count() == 1) packed = entry->packed;
      c.erase(entry);
      break;
    }
  }
  if (!packed) packed = std::make_shared<PackedWeight>(bytes);
  pack(packed->data);
  const std::lock_guard lock(c.mutex);
  for (auto entry = c.entries.begin(); entry != c.entries.end(); ++entry)
    if (entry->key == key) {  // another thread was as fast
      c.erase(entry);
      break;
    }
  c.entries.push_front({key, fingerprint, packed});
  c.bytes += bytes;
  c.shrink(c.limit);
  return packed;
}

size_t weight_cache_bytes() {
  const std::lock_guard lock(cache().mutex);
  return cache().bytes;
}

size_t weight_cache_limit() {
  const std::lock_guard lock(cache().mutex);
  return cache().limit;
}

void set_weight_cache_limit(size_t bytes) {
  const std::lock_guard lock(cache().mutex);
  cache().limit = bytes;
  cache().shrink(bytes);
}

void clear_weight_cache() {
  const std::lock_guard lock(cache().mutex);
  cache().shrink(0);
}

}  // namespace imagegen
