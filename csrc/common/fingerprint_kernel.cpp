#include "fingerprint.h"
#include "memory.h"
#include "parallel.h"
#include "simd.h"

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

constexpr int kHashLanes = 64;         // four AVX-512 registers: the multiplications' latency overlaps
constexpr int64_t kPiece = 256 << 10;  // bytes hashed by one thread at a time
constexpr int kParts = kHashLanes * 4 / kVectorBytes;
typedef uint32_t Hash __attribute__((vector_size(kVectorBytes)));

// Each step is a bijection of the hash for given data and of the data for a given hash, so no single change is lost;
// the rotation carries high bits down, where the multiplication mixes them again.
INLINE Hash mix(Hash h, Hash data) {
  return ((h << 13 | h >> 19) ^ data) * 0x9E3779B1u;
}

INLINE uint64_t mix(uint64_t h, uint64_t data) {
  h = (h ^ data) * 0x9E3779B97F4A7C15ull;
  return h ^ h >> 29;
}

// One register at a time: of a vector of several, compilers keep the hash in memory.
INLINE void mix(Hash (&h)[kParts], const char* p) {
  UNROLL(16) for (int i = 0; i < kParts; ++i) {
    Hash data;
    std::memcpy(&data, p + i * sizeof(Hash), sizeof(data));
    h[i] = mix(h[i], data);
  }
}

uint64_t hash_piece(const char* p, int64_t bytes) {
  Hash h[kParts] = {};
  int64_t i = 0;
  for (; i + int64_t{sizeof(h)} <= bytes; i += sizeof(h)) mix(h, p + i);
  char last[sizeof(h)] = {};
  std::memcpy(last, p + i, bytes - i);
  mix(h, last);
  uint64_t total = bytes;
  for (int lane = 0; lane < kHashLanes; ++lane)
    total = mix(total, h[lane / (kHashLanes / kParts)][lane % (kHashLanes / kParts)]);
  return total;
}

}  // namespace

uint64_t fingerprint_kernel(const void* p, int64_t bytes) {
  const int64_t pieces = ceil_div(bytes, kPiece);
  uint64_t* hashes = static_cast<uint64_t*>(allocate(pieces * sizeof(uint64_t)));
  parallel_for(pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      hashes[i] = hash_piece(static_cast<const char*>(p) + i * kPiece, min(kPiece, bytes - i * kPiece));
  });
  uint64_t total = bytes;
  for (int64_t i = 0; i < pieces; ++i) total = mix(total, hashes[i]);
  release(hashes, pieces * sizeof(uint64_t));
  return total;
}

}  // namespace imagegen::IMAGEGEN_CAPABILITY
