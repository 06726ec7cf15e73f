// Which scores of a panel of queries and a block of keys count, and what is added to them.
#pragma once
#include <array>

#include "common/tile_transform.h"
#include "ops/attention.h"

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.6931471805599453;

template <class T>
constexpr T kInfinity = T(__builtin_inf());

// Bit i says whether query i of a vector sees a key: one instruction hides a vector of scores while they are still in
// registers. Of a panel and a run of several blocks of keys there are [V][kSeenStride], a bit of each key: a mask that
// exceeds the second-level cache is read in long runs.
using SeenBits = uint16_t;
constexpr int kMostKeys = 16 * kRows, kMostSeenKeys = 3 * kMostKeys;
constexpr int kKeysOfWords = kVectorBytes / 2, kSeenStride = kMostSeenKeys + kKeysOfWords;
constexpr int kSeenOfPanel = 2 * kSeenStride;

template <class T>
INLINE Vec<T> hide_unseen(Vec<T> s, SeenBits seen) {
  const Vec<T> hidden = broadcast(-kInfinity<T>);
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vec<T>)_mm512_mask_mov_ps((__m512)hidden, seen, (__m512)s);
#endif
  Bits<T> bit;
  for (int i = 0; i < kLanes<T>; ++i) bit[i] = 1 << i;
  return select<T>((bit & seen) != 0, s, hidden);
}

// Masks the scores s[n keys][V * L] of the panel from query q0 and of the keys from k0.
template <class T, int V>
class ScoreMask {
  static constexpr int L = kLanes<T>;
  typedef SeenBits Words __attribute__((vector_size(kVectorBytes)));  // of neighbouring keys

  const AttentionParams& p;
  const int64_t b, h, q0;

 public:
  ScoreMask(const AttentionParams& p, int64_t b, int64_t h, int64_t q0) : p(p), b(b), h(h), q0(q0) {}

  // Keys at or past this one no query of the panel sees.
  int64_t end() const {
    const int64_t last = min<int64_t>(q0 + V * L, p.q_len) - 1;
    return p.causal ? min(p.k_len, last + p.k_len - p.q_len + 1) : p.k_len;
  }

  // Whether some of these keys may be hidden from some query.
  bool hides(int64_t k0, int64_t n) const {
    return p.mask.kind == AttentionMaskKind::boolean || (p.causal && k0 + n > q0 + p.k_len - p.q_len + 1);
  }

  // Which queries of the panel see which of n keys.
  void see(int64_t k0, int64_t n, SeenBits* seen) const {
    for (int v = 0; v < V; ++v) {
      SeenBits* const bits = seen + v * kSeenStride;
      if (p.mask.kind != AttentionMaskKind::boolean)
        std::memset(bits, 0xff, n * sizeof(SeenBits));
      else if (p.mask.k_stride == 1 && n >= kKeysOfWords)
        see_mask<true>(q0 + v * L, k0, n, bits);
      else
        see_mask<false>(q0 + v * L, k0, n, bits);
      if (p.causal) forbid_future(q0 + v * L, k0, n, bits);
    }
  }
  // How many of n keys there are up to the last that any query sees.
  static int64_t last_seen(const SeenBits* seen, int64_t n) {
    while (n > 0 && !(seen[n - 1] | seen[(V - 1) * kSeenStride + n - 1])) --n;
    return n;
  }

  // Asks for a key's bits. Those of a long mask lie past the second-level cache: waiting for them took 7 % of a bf16
  // forward over 4096 keys at D = 40.
  static INLINE void prefetch_seen(const SeenBits* seen) {
    for (int v = 0; v < V; ++v) __builtin_prefetch(seen + v * kSeenStride);
  }

  // Asks for the mask's rows of part i of n of the panel's queries. A stream of pages, a line or two of each, no
  // hardware foresees: where the mask exceeds the second-level cache, up to a fifth of the time.
  void prefetch(int64_t k0, int64_t keys, int64_t i, int64_t n) const {
    if (p.mask.kind != AttentionMaskKind::boolean || p.mask.k_stride != 1 || p.mask.q_stride == 0) return;
    const bool* const from = row<bool>() + k0;
    for (int64_t q = q0 + i * V * L / n; q < min(p.q_len, q0 + (i + 1) * V * L / n); ++q)
      for (int64_t k = 0; k < keys + 63; k += 64)
        __builtin_prefetch(from + q * p.mask.q_stride + min(k, keys - 1), 0, 2);
  }

  // s * scale + mask, in units of log2; top becomes the largest of itself and these.
  void add(T* s, int64_t k0, int64_t n, T scale, Vec<T>* top) const {
    if (p.mask.dtype == Dtype::f64) {
      if constexpr (sizeof(T) == 8) add_as<double>(s, k0, n, scale, top);
    } else if (p.mask.dtype == Dtype::f32) {
      add_as<float>(s, k0, n, scale, top);
    } else if constexpr (sizeof(T) == 4) {
      p.mask.dtype == Dtype::bf16 ? add_as<bf16>(s, k0, n, scale, top) : add_as<fp16>(s, k0, n, scale, top);
    }
  }

 private:
  template <class M>
  const M* row() const {
    return static_cast<const M*>(p.mask.p) + b * p.mask.batch_stride + h * p.mask.head_stride;
  }

  // A line of the mask is read at once: rows of a power of two of keys drive each other from the first-level cache.
  template <bool kWhole>  // words of neighbouring keys; the last ones overlap those before
  void see_mask(int64_t q, int64_t k0, int64_t n, SeenBits* seen) const {
    const bool* const from = row<bool>() + q * p.mask.q_stride + k0 * p.mask.k_stride;
    const int64_t last = max<int64_t>(0, n - kKeysOfWords);
    int64_t k = 0;
    for (; k + kKeysOfWords < n; k += 2 * kKeysOfWords)
      see_words<kWhole>(from, q, n, seen, k, min(k + kKeysOfWords, last));
    if (k < n) see_words<kWhole>(from, q, n, seen, min(k, last));
  }
  // Bit by bit from each query: 4 instructions for as many scores as there are words.
  template <bool kWhole, class... At>
  INLINE void see_words(const bool* from, int64_t q, int64_t n, SeenBits* seen, At... at) const {
    const bool any_query = p.mask.q_stride == 0;  // one row for all
    const int64_t queries = any_query ? 1 : min<int64_t>(L, p.q_len - q), first[] = {at...};
    const SeenBits first_bit = any_query ? 0xffff : 1;
    Words words[sizeof...(At)] = {}, bit = Words{} + first_bit;
    for (int64_t i = 0; i < queries; ++i, bit += bit) UNROLL(2) for (size_t j = 0; j < sizeof...(At); ++j) {
        const bool* const keys = from + i * p.mask.q_stride + first[j] * p.mask.k_stride;
        words[j] |= (Words)((kWhole ? load_words(keys) : gather_words(keys, n)) != 0) & bit;
      }
    for (size_t j = 0; j < sizeof...(At); ++j) std::memcpy(seen + first[j], &words[j], sizeof(Words));
  }
  Words gather_words(const bool* keys, int64_t n) const {
    bool part[kKeysOfWords] = {};
    for (int64_t i = 0; i < min<int64_t>(n, kKeysOfWords); ++i) part[i] = keys[i * p.mask.k_stride];
    return load_words(part);
  }
  static INLINE Words load_words(const bool* p) {
#if defined(__AVX512BW__)  // the compiler makes four instructions of the conversion
    return (Words)_mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
    typedef uint8_t Bytes __attribute__((vector_size(kKeysOfWords)));
    Bytes bytes;
    std::memcpy(&bytes, p, sizeof(bytes));
    return __builtin_convertvector(bytes, Words);
#endif
  }

  void forbid_future(int64_t q, int64_t k0, int64_t n, SeenBits* seen) const {
    const int64_t first_hidden = q + p.k_len - p.q_len + 1;  // from the first lane
    for (int64_t k = max<int64_t>(0, first_hidden - k0); k < n; ++k)
      seen[k] &= 0xffff << min<int64_t>(16, k0 + k - first_hidden + 1);
  }

  template <class M>
  void add_as(T* s, int64_t k0, int64_t n, T scale, Vec<T>* top) const {
    for (int v = 0; v < V; ++v)
      for (int64_t k = 0; k < n; k += L) {
        T* const at = s + (k * V + v) * L;
        Vec<T> bias[L];
        tile<M>(q0 + v * L, k0 + k, n - k, bias);
        for (int i = 0; i < min<int64_t>(L, n - k); ++i) {
          const Vec<T> masked = load(at + i * V * L) * scale + bias[i];
          store(at + i * V * L, masked);
          top[v] = larger(top[v], masked);
        }
      }
  }

  // bias[key] for L queries from q, of n keys from k. Queries past the last one get the last one's.
  template <class M>
  INLINE void tile(int64_t q, int64_t k, int64_t n, Vec<T>* bias) const {
    const M* from = row<M>() + k * p.mask.k_stride;
    if (p.mask.q_stride == 0) {
      const Vec<T> row = load_additive(from, n);
      for (int i = 0; i < L; ++i) bias[i] = broadcast(row[i]);
      return;
    }
    for (int i = 0; i < L; ++i) bias[i] = load_additive(from + min(q + i, p.q_len - 1) * p.mask.q_stride, n);
    transpose<T>(bias);
  }

  // n keys of a row of the mask, in units of log2.
  template <class M>
  INLINE Vec<T> load_additive(const M* from, int64_t n) const {
    n = min<int64_t>(n, L);
    if constexpr (std::is_same_v<Compute<M>, T>)
      if (p.mask.k_stride == 1) return load(from, n) * T(kLog2e);
    T part[L] = {};
    for (int64_t i = 0; i < n; ++i) part[i] = T(to_compute(from[i * p.mask.k_stride])) * T(kLog2e);
    return load(part);
  }
};

// Where lanes are keys: masks scores of neighbouring queries as the mask lies, its keys side by side.
class MaskOfKeys {
  static constexpr int L = kLanes<float>;

  const AttentionMaskKind kind;
  const char* from;  // the mask of the first query and key
  int64_t q_stride;  // in bytes
  const int64_t keys;
  int64_t queries;  // from the first; those past them get the last one's

 public:
  static bool takes(const AttentionMask& m) { return m.kind == AttentionMaskKind::none || m.k_stride == 1; }

  MaskOfKeys(const AttentionParams& p, int64_t b, int64_t h, int64_t q0, int64_t queries)
      : kind(p.mask.kind), keys(p.k_len), queries(queries) {
    const int64_t size = kind == AttentionMaskKind::boolean ? sizeof(bool) : sizeof(float);
    const int64_t first = b * p.mask.batch_stride + h * p.mask.head_stride + q0 * p.mask.q_stride;
    from = static_cast<const char*>(p.mask.p) + first * size, q_stride = p.mask.q_stride * size;
  }

  // Calls f with the function that makes of acc[r][v], whose keys are from k0, masked scores in units of log2: those
  // of query r and V vectors of keys. Keys past the last one get -infinity.
  template <int V, class F>
  INLINE void dispatch(int64_t r0, int64_t k0, float scale, const F& f) const {
    const int64_t rest = min<int64_t>(L, keys - k0 - (V - 1) * L);  // of the last vector
    const Vec<float> past_keys = load(kPastKeys.data() + L - rest);
    if (kind == AttentionMaskKind::boolean)
      f([&](Vec<float> s, int64_t r, int v) __attribute__((always_inline)) {
        return hide_unseen(s * scale, at<bool>(r0 + r, k0 + v * L), v < V - 1 ? L : rest);
      });
    else if (kind == AttentionMaskKind::additive)
      f([&](Vec<float> s, int64_t r, int v) __attribute__((always_inline)) {
        const float* const bias = at<float>(r0 + r, k0 + v * L);
        if (v < V - 1) return s * scale + load(bias) * float(kLog2e);
        return s * scale + (load(bias, rest) * float(kLog2e) + past_keys);
      });
    else
      f([&](Vec<float> s, int64_t, int v)
            __attribute__((always_inline)) { return v < V - 1 ? s * scale : s * scale + past_keys; });
  }

 private:
  // From n before its middle on: 0 for n keys, then what hides those past the last one.
  static constexpr auto kPastKeys = [] {
    std::array<float, 2 * L> hidden{};
    for (int i = L; i < 2 * L; ++i) hidden[i] = -kInfinity<float>;
    return hidden;
  }();

  template <class M>
  INLINE const M* at(int64_t query, int64_t key) const {
    return reinterpret_cast<const M*>(from + min(query, queries - 1) * q_stride) + key;
  }

  static INLINE Vec<float> hide_unseen(Vec<float> s, const bool* seen, int64_t n) {
    const Vec<float> hidden = broadcast(-kInfinity<float>);
#if defined(__AVX512BW__)
    const __m128i bytes = _mm_maskz_loadu_epi8((1u << n) - 1, seen);
    return (Vec<float>)_mm512_mask_mov_ps((__m512)hidden, _mm_test_epi8_mask(bytes, bytes), (__m512)s);
#else
    typedef uint8_t Bytes __attribute__((vector_size(L)));
    Bytes bytes{};
    std::memcpy(&bytes, seen, n);
    return select<float>(__builtin_convertvector(bytes, Bits<float>) != 0, s, hidden);
#endif
  }
};

}  // namespace
}  // namespace imagegen::IMAGEGEN_CAPABILITY
