// Weights in transformed form, kept until the weight changes.
//
// An entry belongs to an address, a shape and an algorithm, and is used only while a fingerprint of the weight's
// content, taken at every call, is the one it was made from. So no way of writing to a weight can go unnoticed: in
// place, through .data, by load_state_dict, an optimizer, another library, or a new tensor at an old address.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <string_view>

#include "memory.h"

namespace imagegen {

struct WeightKey {
  const void* data;
  int64_t cout, cin;
  int64_t stride[4];
  int dtype, capability;
  std::string_view algorithm;
  bool operator==(const WeightKey&) const = default;
};

class PackedWeight {
 public:
  explicit PackedWeight(size_t bytes) : bytes(bytes), data(allocate(bytes)) {}
  ~PackedWeight() { release(data, bytes); }
  PackedWeight(const PackedWeight&) = delete;
  PackedWeight& operator=(const PackedWeight&) = delete;

  const size_t bytes;
  void* const data;
};

// The packed weight of `key`: from the cache, or made by pack(data) now. Safe from any thread; the result stays valid
// for as long as it is held.
std::shared_ptr<PackedWeight> packed_weight(const WeightKey& key, uint64_t fingerprint, size_t bytes,
                                            const std::function<void(void*)>& pack);

size_t weight_cache_bytes();
int64_t weight_cache_misses();  // how often a weight was packed
// Half of the machine's memory unless set otherwise. What does not fit is packed again at every call, until entries
// that nothing asks for any more make room.
size_t weight_cache_limit();
void set_weight_cache_limit(size_t bytes);
void clear_weight_cache();

}  // namespace imagegen
