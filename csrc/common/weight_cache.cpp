#include "weight_cache.h"

#include <list>
#include <mutex>

namespace imagegen {
namespace {

struct Entry {
  WeightKey key;
  uint64_t fingerprint;
  std::shared_ptr<PackedWeight> packed;
  int64_t last_use;  // the lookup that wanted it last
};

// Models have some fifty of these layers, so a list, latest first, is enough.
struct Cache {
  std::mutex mutex;
  std::list<Entry> entries;
  size_t bytes = 0, limit = machine_memory() / 2;
  int64_t lookups = 0, misses = 0;

  void erase(std::list<Entry>::iterator entry) {
    bytes -= entry->packed->bytes;
    entries.erase(entry);
  }
  void shrink(size_t target) {
    while (bytes > target) erase(std::prev(entries.end()));
  }
  // Whether there is room for so many bytes, which entries long unused make. A model whose weights do not all fit asks
  // for them in turn: if each new one drove out the oldest, none would ever be found again.
  bool make_room(size_t wanted) {
    const int64_t stale = lookups - 4 * (static_cast<int64_t>(entries.size()) + 1);
    while (bytes + wanted > limit && !entries.empty() && entries.back().last_use < stale)
      erase(std::prev(entries.end()));
    return bytes + wanted <= limit;
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
    ++c.lookups;
    for (auto entry = c.entries.begin(); entry != c.entries.end(); ++entry) {
      if (!(entry->key == key)) continue;
      if (entry->fingerprint == fingerprint) {
        entry->last_use = c.lookups;
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
  ++c.misses;
  for (auto entry = c.entries.begin(); entry != c.entries.end(); ++entry)
    if (entry->key == key) {  // another thread was as fast
      c.erase(entry);
      break;
    }
  if (c.make_room(bytes)) {
    c.entries.push_front({key, fingerprint, packed, c.lookups});
    c.bytes += bytes;
  }
  return packed;
}

size_t weight_cache_bytes() {
  const std::lock_guard lock(cache().mutex);
  return cache().bytes;
}

int64_t weight_cache_misses() {
  const std::lock_guard lock(cache().mutex);
  return cache().misses;
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
