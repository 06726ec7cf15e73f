#include "kept_memory.h"

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>

#include "memory.h"

namespace imagegen {
namespace {

struct Range {
  size_t bytes;
  uint64_t given_back;  // when, by a count; of the last part that joined
};

struct Kept {
  std::mutex mutex;
  std::map<char*, Range> ranges;  // by address, so that neighbours meet; no two touch
  size_t bytes = 0;               // of all ranges
  size_t in_use = 0, most_in_use = 0;
  size_t limit = machine_memory() / 16;
  uint64_t count = 0;

  char* take(size_t size) {
    auto best = ranges.end();
    for (auto range = ranges.begin(); range != ranges.end(); ++range)
      if (range->second.bytes >= size && (best == ranges.end() || range->second.bytes < best->second.bytes))
        best = range;
    if (best == ranges.end()) return nullptr;
    char* const p = best->first;
    const Range rest{best->second.bytes - size, best->second.given_back};
    ranges.erase(best);
    if (rest.bytes) ranges.emplace(p + size, rest);
    bytes -= size;
    return p;
  }

  void add(char* p, size_t size) {
    bytes += size;
    const auto next = ranges.lower_bound(p);
    if (next != ranges.end() && p + size == next->first) {
      size += next->second.bytes;
      ranges.erase(next);
    }
    const auto after = ranges.lower_bound(p);
    if (after != ranges.begin()) {
      const auto before = std::prev(after);
      if (before->first + before->second.bytes == p) {
        before->second = {before->second.bytes + size, ++count};
        return;
      }
    }
    ranges.emplace(p, Range{size, ++count});
  }

  void shrink(size_t most) {
    while (bytes > most) {
      const auto oldest = std::min_element(ranges.begin(), ranges.end(), [](const auto& a, const auto& b) {
        return a.second.given_back < b.second.given_back;
      });
      auto& [p, range] = *oldest;
      const size_t size = std::min(range.bytes, bytes - most);
      range.bytes -= size;
      unmap_memory(p + range.bytes, size);
      if (range.bytes == 0) ranges.erase(oldest);
      bytes -= size;
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
  bytes = whole_pages(bytes);
  Kept& k = kept();
  {
    const std::lock_guard lock(k.mutex);
    k.in_use += bytes;
    k.most_in_use = std::max(k.most_in_use, k.in_use);
    if (char* const p = k.take(bytes)) return {p, bytes};
    k.shrink(k.most_in_use - k.in_use);
  }
  const KeptBlock block{map_memory(bytes), bytes};
  page_in(block.p, bytes);
  return block;
}

void give_back(KeptBlock block) {
  if (block.bytes < kSmallestKept) return release(block.p, block.bytes);
  Kept& k = kept();
  const std::lock_guard lock(k.mutex);
  k.in_use -= block.bytes;
  k.add(static_cast<char*>(block.p), block.bytes);
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
  kept().most_in_use = kept().in_use;
}

}  // namespace imagegen
