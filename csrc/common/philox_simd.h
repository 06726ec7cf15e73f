// Philox on vectors: as many counters at a time as a register holds floats.
#pragma once
#include "simd.h"

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

#if defined(__AVX512F__) || defined(__AVX2__)
// Words as the multiplier takes them, each in the low half of 64 bits: a high half is whatever it is. What Philox does
// to a word never leaves it, so that between its first and last round nothing is moved but high products to low halves
// (a third fewer instructions than keeping words side by side).
struct Spread {
  Words even, odd;
};
INLINE Words high_halves(Words w) {
#if defined(__AVX512F__)
  return (Words)_mm512_srli_epi64((__m512i)w, 32);
#else
  return (Words)_mm256_srli_epi64((__m256i)w, 32);
#endif
}
INLINE Words products(Words a, uint32_t m) {
#if defined(__AVX512F__)
  return (Words)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi32(static_cast<int>(m)));
#else
  return (Words)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi32(static_cast<int>(m)));
#endif
}
INLINE void multiply(Spread a, uint32_t m, Spread& high, Spread& low) {
  low = {products(a.even, m), products(a.odd, m)};
  high = {high_halves(low.even), high_halves(low.odd)};
}
INLINE Spread operator^(Spread a, Spread b) {
  return {a.even ^ b.even, a.odd ^ b.odd};
}
INLINE Spread operator^(Spread a, uint32_t k) {
  return {a.even ^ k, a.odd ^ k};
}
INLINE Spread spread(Words w) {
  return {w, high_halves(w)};
}
INLINE Words gathered(Spread s) {
#if defined(__AVX512F__)
  return (Words)_mm512_mask_blend_epi32(0xaaaa, (__m512i)s.even, _mm512_slli_epi64((__m512i)s.odd, 32));
#else
  return (Words)_mm256_blend_epi32((__m256i)s.even, _mm256_slli_epi64((__m256i)s.odd, 32), 0xaa);
#endif
}
#else
using Spread = Words;
INLINE void multiply(Words a, uint32_t m, Words& high, Words& low) {
  for (int i = 0; i < kLanes<float>; ++i) {
    const uint64_t product = uint64_t{a[i]} * m;
    high[i] = static_cast<uint32_t>(product >> 32), low[i] = static_cast<uint32_t>(product);
  }
}
INLINE Words spread(Words w) {
  return w;
}
INLINE Words gathered(Words w) {
  return w;
}
#endif
INLINE Vec<float> signed_to_float(Words w) {
  return __builtin_convertvector((Bits<float>)w, Vec<float>);
}
INLINE Vec<float> unsigned_to_float(Words w) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtepu32_ps((__m512i)w);
#else  // both halves are exact, so that the sum alone rounds
  return signed_to_float(w >> 16) * 65536.0f + signed_to_float(w & 0xffff);
#endif
}
INLINE Words shift_right_signed(Words w, int n) {
  return (Words)((Bits<float>)w >> n);
}
INLINE Vec<float> words_to_float(Words w) {
  return bit_cast<Vec<float>>(w);
}
INLINE Words float_to_words(Vec<float> f) {
  return bit_cast<Words>(f);
}
INLINE Vec<float> square_root(Vec<float> f) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_sqrt_ps((__m512)f);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_sqrt_ps((__m256)f);
#else
  for (int i = 0; i < kLanes<float>; ++i) f[i] = __builtin_sqrtf(f[i]);
  return f;
#endif
}

}  // namespace
}  // namespace imagegen::IMAGEGEN_CAPABILITY

#include "philox.h"  // needs the functions above

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

// Four vectors that hold word w of each counter, to four that hold the counters' words one after the other, given
// counters in the order of `noise_order`. Registers are made of parts of four lanes and nothing leaves its part.
template <class V>
INLINE void interleave(V& x, V& y, V& z, V& w) {
#if defined(__AVX512F__)
  const __m512 xy = _mm512_unpacklo_ps((__m512)x, (__m512)y), zw = _mm512_unpacklo_ps((__m512)z, (__m512)w);
  const __m512 xy_high = _mm512_unpackhi_ps((__m512)x, (__m512)y), zw_high = _mm512_unpackhi_ps((__m512)z, (__m512)w);
  x = (V)_mm512_shuffle_ps(xy, zw, 0x44), y = (V)_mm512_shuffle_ps(xy, zw, 0xee);
  z = (V)_mm512_shuffle_ps(xy_high, zw_high, 0x44), w = (V)_mm512_shuffle_ps(xy_high, zw_high, 0xee);
#elif defined(__AVX2__)
  const __m256 xy = _mm256_unpacklo_ps((__m256)x, (__m256)y), zw = _mm256_unpacklo_ps((__m256)z, (__m256)w);
  const __m256 xy_high = _mm256_unpackhi_ps((__m256)x, (__m256)y), zw_high = _mm256_unpackhi_ps((__m256)z, (__m256)w);
  x = (V)_mm256_shuffle_ps(xy, zw, 0x44), y = (V)_mm256_shuffle_ps(xy, zw, 0xee);
  z = (V)_mm256_shuffle_ps(xy_high, zw_high, 0x44), w = (V)_mm256_shuffle_ps(xy_high, zw_high, 0xee);
#else
  static_assert(kLanes<float> == 4);
  const V a = x, b = y, c = z, d = w;
  x = V{a[0], b[0], c[0], d[0]}, y = V{a[1], b[1], c[1], d[1]};
  z = V{a[2], b[2], c[2], d[2]}, w = V{a[3], b[3], c[3], d[3]};
#endif
}

// Lane i holds the counter of this number: vector k of `interleave` then has those of k L/4 … k L/4 + L/4 - 1, in
// order.
INLINE Words noise_order() {
  constexpr uint32_t L = kLanes<float>;
  Words order;
  for (uint32_t i = 0; i < L; ++i) order[i] = i % 4 * (L / 4) + i / 4;
  return order;
}

// The keys as memory that the compiler can't see through: it would make them anew for every vector, by additions and
// moves from one register file to the other.
INLINE PhiloxKeys kept_keys(uint64_t seed) {
  PhiloxKeys keys = philox_keys(seed);
  asm volatile("" : "+m"(keys));
  return keys;
}

// The words of one vector of counters from `block` on, in the order of `noise_order`.
INLINE FourWords<Words> noise_words(const NoiseKey& key, const PhiloxKeys& keys, uint64_t block, Words order) {
  const FourWords<Words> c = counters(key, static_cast<uint32_t>(block) + order, static_cast<uint32_t>(block >> 32));
  const auto words = philox<Spread>({spread(c.x), spread(c.y), spread(c.z), spread(c.w)}, keys);
  return {gathered(words.x), gathered(words.y), gathered(words.z), gathered(words.w)};
}

// Elements first … first + n - 1 of one image's sequence: the words themselves, or normals. first is a multiple of 4;
// out has room for n rounded up to four vectors.
INLINE void noise(const NoiseKey& key, int64_t first, int64_t n, uint32_t* out) {
  constexpr int L = kLanes<float>;
  const Words order = noise_order();
  const PhiloxKeys keys = kept_keys(key.seed);
  for (int64_t i = 0; i < n; i += 4 * L) {
    const uint64_t block = static_cast<uint64_t>(first + i) / 4;
    auto [x, y, z, w] = noise_words(key, keys, block, order);
    interleave(x, y, z, w);
    const Words words[4] = {x, y, z, w};
    std::memcpy(out + i, words, sizeof(words));
  }
}
INLINE void noise(const NoiseKey& key, int64_t first, int64_t n, float* out) {
  constexpr int L = kLanes<float>;
  const Words order = noise_order();
  const PhiloxKeys keys = kept_keys(key.seed);
  // The next vector's words are made while this one's become normals: each waits for its own results alone, longer than
  // the processor looks ahead (a tenth faster).
  uint64_t block = static_cast<uint64_t>(first) / 4;
  FourWords<Words> words = noise_words(key, keys, block, order);
  for (int64_t i = 0; i < n; i += 4 * L) {
    const auto [x, y, z, w] = words;
    words = noise_words(key, keys, block += L, order);
    Vec<float> a, b, c, d;
    box_muller<Words>(x, y, a, b);
    box_muller<Words>(z, w, c, d);
    interleave(a, b, c, d);
    store(out + i, a), store(out + i + L, b), store(out + i + 2 * L, c), store(out + i + 3 * L, d);
  }
}

}  // namespace
}  // namespace imagegen::IMAGEGEN_CAPABILITY
