// Counted random numbers: Philox-4x32-10 (Salmon et al. 2011) and Box-Muller, for one thread of a GPU (W = uint32_t)
// and for a vector of counters (W = Words, philox_simd.h, which includes this file) alike. The bits are the same
// everywhere; the normals made of them differ by what the rounding of products that are added may differ.
//
// Element e of image `sample` takes word e % 4 of the counter (e / 4, sample, step, stream), under the seed as the key.
// INLINE comes from the file that includes this one.
#pragma once
#include <cstdint>

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

INLINE void multiply(uint32_t a, uint32_t m, uint32_t& high, uint32_t& low) {
  const uint64_t product = uint64_t{a} * m;
  high = static_cast<uint32_t>(product >> 32), low = static_cast<uint32_t>(product);
}
INLINE float unsigned_to_float(uint32_t w) {
  return static_cast<float>(w);
}
INLINE float signed_to_float(uint32_t w) {
  return static_cast<float>(static_cast<int32_t>(w));
}
INLINE uint32_t shift_right_signed(uint32_t w, int n) {
  return static_cast<uint32_t>(static_cast<int32_t>(w) >> n);
}
#ifdef __CUDA_ARCH__
INLINE float words_to_float(uint32_t w) {
  return __uint_as_float(w);
}
INLINE uint32_t float_to_words(float f) {
  return __float_as_uint(f);
}
#else
INLINE float words_to_float(uint32_t w) {
  float f;
  __builtin_memcpy(&f, &w, sizeof(f));
  return f;
}
INLINE uint32_t float_to_words(float f) {
  uint32_t w;
  __builtin_memcpy(&w, &f, sizeof(w));
  return w;
}
#endif
INLINE float square_root(float f) {
  return __builtin_sqrtf(f);
}

// Which sequence: everything a counter holds but the element.
struct NoiseKey {
  uint64_t seed;
  uint32_t sample, step, stream;
};

template <class W>
struct FourWords {
  W x, y, z, w;
};

// The keys of the rounds: those of a vector of counters are kept (`kept_keys`), as registers are too few to.
struct PhiloxKeys {
  uint32_t round[10][2];
};
INLINE PhiloxKeys philox_keys(uint64_t seed) {
  PhiloxKeys keys;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
  for (int i = 0; i < 10; ++i, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) keys.round[i][0] = k0, keys.round[i][1] = k1;
  return keys;
}

template <class W>
INLINE FourWords<W> philox(FourWords<W> c, const PhiloxKeys& keys) {
#pragma GCC unroll 10
  for (int i = 0; i < 10; ++i) {
    W p_high, p_low, q_high, q_low;
    multiply(c.x, 0xD2511F53u, p_high, p_low);
    multiply(c.z, 0xCD9E8D57u, q_high, q_low);
    c = {q_high ^ c.y ^ keys.round[i][0], q_low, p_high ^ c.w ^ keys.round[i][1], p_low};
  }
  return c;
}

// The counter of elements 4 block … 4 block + 3: its last word holds the stream below the block's high bits.
template <class W>
INLINE FourWords<W> counters(const NoiseKey& key, W block_low, uint32_t block_high) {
  const W zero = block_low ^ block_low;
  return {block_low, zero + key.sample, zero + key.step, zero + (key.stream | block_high << 16)};
}

template <class W>
INLINE FourWords<W> noise_words(const NoiseKey& key, W block_low, uint32_t block_high) {
  return philox(counters(key, block_low, block_high), philox_keys(key.seed));
}

// ln u for 2^-33 <= u <= 1, to 1e-7: u = 2^e (1 + f) with 1 + f from sqrt(1/2) to sqrt(2).
template <class W, class F>
INLINE F log_of_uniform(F u) {
  const uint32_t half_root = 0x3f3504f3;
  const W bits = float_to_words(u) + (0x3f800000 - half_root);
  const F e = signed_to_float((bits >> 23) - 127), f = words_to_float((bits & 0x7fffff) + half_root) - 1.0f;
  F p = f * 8.700359959e-2f - 1.426747630e-1f;  // minimax, 3.1e-8 of ln(1 + f)
  p = p * f + 1.491478701e-1f;
  p = p * f - 1.657758601e-1f;
  p = p * f + 1.996306229e-1f;
  p = p * f - 2.500133702e-1f;
  p = p * f + 3.333391077e-1f;
  return e * 0.693147181f + (f + f * f * (f * p - 0.5f));
}

// sqrt(-2 ln u) times cos and sin of 2 pi v, with u = (r0 + 1/2) / 2^32 rounded to float and v = r1 / 2^32.
template <class W, class F>
INLINE void box_muller(W r0, W r1, F& z0, F& z1) {
  const F u = unsigned_to_float(r0) * 0x1p-32f + 0x1p-33f;
  const F radius = square_root(-2.0f * log_of_uniform<W, F>(u));
  // The angle is a multiple of pi/2 and the rest t, both exact in integers; t from -pi/4 to pi/4.
  const W turned = r1 + 0x20000000u;
  const F t = signed_to_float(shift_right_signed(r1 << 2, 2)) * 1.4629180792671596e-9f, s = t * t;
  F sin_t = s * -1.951729790e-4f + 8.332178136e-3f;  // minimax, 4e-9 and 1e-10
  sin_t = t + t * s * (sin_t * s - 1.666665494e-1f);
  F cos_t = s * 2.443844968e-5f - 1.388736750e-3f;
  cos_t = (cos_t * s + 4.166664687e-2f) * (s * s) + (1.0f - 0.5f * s);
  // Odd quarters swap sine and cosine; the cosine is negative in the second and third quarter, the sine in the last
  // two.
  const W odd = shift_right_signed(turned << 1, 31), c = float_to_words(cos_t), d = float_to_words(sin_t);
  const W swap = (c ^ d) & odd;
  z0 = radius * words_to_float((c ^ swap) ^ ((turned + 0x40000000u) & 0x80000000u));
  z1 = radius * words_to_float((d ^ swap) ^ (turned & 0x80000000u));
}

}  // namespace
}  // namespace imagegen::IMAGEGEN_CAPABILITY
