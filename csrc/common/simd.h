// Vectors of one register, for kernel files: the compiler's vector extensions, with intrinsics where they do not reach
// (half precision, bf16 dot products, masked tails, 2^n scaling).
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "activation.h"
#include "scalar.h"

#define INLINE inline __attribute__((always_inline))
#define NOINLINE __attribute__((noinline))
#define IMAGEGEN_PRAGMA(x) _Pragma(#x)
#define UNROLL(n) IMAGEGEN_PRAGMA(GCC unroll n)

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct VectorOf;
template <>
struct VectorOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t bits __attribute__((vector_size(kVectorBytes)));
};
template <>
struct VectorOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t bits __attribute__((vector_size(kVectorBytes)));
};
template <class T>
using Vec = typename VectorOf<T>::type;
template <class T>
using Bits = typename VectorOf<T>::bits;
template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);

// The type sums are kept in.
template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

template <class T>
INLINE T min(T a, T b) {
  return a < b ? a : b;
}
template <class T>
INLINE T max(T a, T b) {
  return a > b ? a : b;
}
INLINE int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}
INLINE int64_t round_up(int64_t a, int64_t b) {
  return ceil_div(a, b) * b;
}

template <class T>
INLINE Vec<T> broadcast(T s) {
  return s - Vec<T>{};
}

template <class To, class From>
INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

// One element, to and from the compute type; round to nearest even.
INLINE float to_compute(float s) {
  return s;
}
INLINE double to_compute(double s) {
  return s;
}
INLINE float to_compute(bf16 s) {
  return bit_cast<float>(uint32_t{s.bits} << 16);
}
INLINE float to_compute(fp16 s) {
  const uint32_t sign = uint32_t(s.bits & 0x8000) << 16, rest = s.bits & 0x7fff;
  if (rest >= 0x7c00) return bit_cast<float>(sign | 0x7f800000 | (rest & 0x3ff) << 13);  // inf, nan
  // The exponents differ by 112; the multiplication also normalises subnormals.
  return bit_cast<float>(sign | bit_cast<uint32_t>(bit_cast<float>(rest << 13) * 0x1p112f));
}
template <class S>
INLINE S from_compute(Compute<S> v);
template <>
INLINE float from_compute<float>(float v) {
  return v;
}
template <>
INLINE double from_compute<double>(double v) {
  return v;
}
template <>
INLINE bf16 from_compute<bf16>(float v) {
  const uint32_t b = bit_cast<uint32_t>(v);
  if ((b & 0x7fffffff) > 0x7f800000) return {uint16_t(b >> 16 | 0x40)};  // nan stays nan
  return {uint16_t((b + 0x7fff + (b >> 16 & 1)) >> 16)};
}
template <>
INLINE fp16 from_compute<fp16>(float v) {
  const uint32_t b = bit_cast<uint32_t>(v), sign = b >> 16 & 0x8000, rest = b & 0x7fffffff;
  if (rest > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (rest >= 0x477ff000) return {uint16_t(sign | 0x7c00)};  // rounds to 2^16 or more
  if (rest < 0x38800000) {                                   // subnormal: let the float adder round at 2^-24
    const uint32_t r = bit_cast<uint32_t>(bit_cast<float>(rest) + 0.5f) - bit_cast<uint32_t>(0.5f);
    return {uint16_t(sign | r)};
  }
  return {uint16_t(sign | (rest - (112u << 23) + 0xfff + (rest >> 13 & 1)) >> 13)};
}

// A vector of elements. load(p, n) reads n < lanes elements and fills with zeros; store(p, v, n) writes n.
INLINE Vec<float> load(const float* p) {
  Vec<float> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
INLINE Vec<double> load(const double* p) {
  Vec<double> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
INLINE void store(float* p, Vec<float> v) {
  std::memcpy(p, &v, sizeof(v));
}
INLINE void store(double* p, Vec<double> v) {
  std::memcpy(p, &v, sizeof(v));
}

INLINE Vec<float> load(const bf16* p) {
  typedef uint16_t u16 __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t u32 __attribute__((vector_size(kVectorBytes)));
  u16 h;
  std::memcpy(&h, p, sizeof(h));
  return bit_cast<Vec<float>>(__builtin_convertvector(h, u32) << 16);
}
INLINE void store(bf16* p, Vec<float> v) {
#if defined(__AVX512BF16__)
  const __m256bh h = _mm512_cvtneps_pbh((__m512)v);
  std::memcpy(p, &h, sizeof(h));
#else
  typedef uint16_t u16 __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t u32 __attribute__((vector_size(kVectorBytes)));
  const u32 b = bit_cast<u32>(v), rounded = (b + 0x7fff + (b >> 16 & 1)) >> 16;
  const u32 nan = (u32)((b & 0x7fffffff) > 0x7f800000);
  const u16 h = __builtin_convertvector((rounded & ~nan) | ((b >> 16 | 0x40) & nan), u16);
  std::memcpy(p, &h, sizeof(h));
#endif
}
INLINE Vec<float> load(const fp16* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes<float>; ++i) v[i] = to_compute(p[i]);
  return v;
#endif
}
INLINE void store(fp16* p, Vec<float> v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<float>; ++i) p[i] = from_compute<fp16>(v[i]);
#endif
}

template <class S>
INLINE Vec<Compute<S>> load(const S* p, int64_t n) {
  constexpr int L = kLanes<Compute<S>>;
  if (n >= L) return load(p);
#if defined(__AVX512F__)
  const __mmask16 m = static_cast<__mmask16>((1u << n) - 1);
  if constexpr (sizeof(S) == 4) return (Vec<Compute<S>>)_mm512_maskz_loadu_ps(m, p);
  if constexpr (sizeof(S) == 2) {
    alignas(32) S part[L];
    _mm256_store_si256(reinterpret_cast<__m256i*>(part), _mm256_maskz_loadu_epi16(m, p));
    return load(part);
  }
#endif
  S part[L] = {};
  for (int i = 0; i < n; ++i) part[i] = p[i];
  return load(part);
}
template <class S>
INLINE void store(S* p, Vec<Compute<S>> v, int64_t n) {
  constexpr int L = kLanes<Compute<S>>;
  if (n >= L) return store(p, v);
#if defined(__AVX512F__)
  if constexpr (sizeof(S) == 4) return _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
#endif
  S part[L];
  store(part, v);
  for (int i = 0; i < n; ++i) p[i] = part[i];
}

// Stores a whole line past the caches, where nothing will read it soon: a plain store would read the line first.
template <class T>
INLINE void stream(T* p, Vec<T> v) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)v);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)v);
#else
  store(p, v);
#endif
}

// Makes what this thread streamed visible before it tells another one that it is done.
INLINE void finish_streams() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Two vectors as bf16 side by side: lane k holds low[k] and high[k].
INLINE Vec<float> interleave_bf16(Vec<float> low, Vec<float> high) {
  typedef uint32_t u32 __attribute__((vector_size(kVectorBytes)));
  const u32 l = bit_cast<u32>(low), h = bit_cast<u32>(high);
  const u32 l_rounded = (l + 0x7fff + (l >> 16 & 1)) >> 16, h_rounded = (h + 0x7fff + (h >> 16 & 1)) & 0xffff0000;
  return bit_cast<Vec<float>>(l_rounded | h_rounded);
}

template <class T>
INLINE Vec<T> select(Bits<T> condition, Vec<T> a, Vec<T> b) {
  return condition ? a : b;
}
template <class T>
INLINE Vec<T> abs(Vec<T> v) {
  return select<T>(v < T(0), -v, v);
}
template <class T>
INLINE T sum(Vec<T> v) {
  T s = 0;
  for (int i = 0; i < kLanes<T>; ++i) s += v[i];
  return s;
}

// Bounds on x; nan stays nan.
INLINE Vec<float> clamp(Vec<float> x, float low, float high) {
#if defined(__AVX512F__)  // these return their second operand where one is nan
  return (Vec<float>)_mm512_min_ps(_mm512_set1_ps(high), _mm512_max_ps(_mm512_set1_ps(low), (__m512)x));
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_min_ps(_mm256_set1_ps(high), _mm256_max_ps(_mm256_set1_ps(low), (__m256)x));
#else
  x = select<float>(x < low, broadcast(low), x);
  return select<float>(x > high, broadcast(high), x);
#endif
}

// The larger of each two; b where either is nan.
INLINE Vec<float> larger(Vec<float> a, Vec<float> b) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return select<float>(a > b, a, b);
#endif
}
INLINE Vec<double> larger(Vec<double> a, Vec<double> b) {
  return select<double>(a > b, a, b);
}

// p * 2^n for the integer n that `shifted` - 1.5 * 2^23 is: the addition that rounded it left n in the low bits.
constexpr float kRound = 12582912.f;
INLINE Vec<float> scale_by_power(Vec<float> p, Vec<float> shifted) {
  return bit_cast<Vec<float>>(bit_cast<Bits<float>>(p) + (bit_cast<Bits<float>>(shifted) << 23));
}

// e^x, relative error below 2e-7 in float; nan stays nan, overflow saturates near the largest float.
INLINE Vec<float> exp(Vec<float> x) {
  x = clamp(x, -87.3f, 88.3f);
  const Vec<float> shifted = x * 1.44269504f + kRound, n = shifted - kRound;
  const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  Vec<float> p = broadcast(8.3122879e-3f);                           // minimax on |r| <= ln 2 / 2, error 1.1e-7
  p = p * r + 4.18923012e-2f;
  p = p * r + 1.666712377e-1f;
  p = p * r + 4.999921688e-1f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return scale_by_power(p, shifted);
}
INLINE Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

#if defined(__AVX512F__)
// The bits of 2^(i/32), less i << 18, so that adding k << 18 for k = 32 n + i gives those of 2^(n + i/32).
alignas(64) constexpr int32_t kPowers[32] = {
    0x3f800000, 0x3f7ecd87, 0x3f7daac3, 0x3f7c980f, 0x3f7b95c2, 0x3f7aa43a, 0x3f79c3d3, 0x3f78f4f0,
    0x3f7837f0, 0x3f778d3a, 0x3f76f532, 0x3f767043, 0x3f75fed7, 0x3f75a15b, 0x3f75583f, 0x3f7523f6,
    0x3f7504f3, 0x3f74fbaf, 0x3f7508a4, 0x3f752c4d, 0x3f75672a, 0x3f75b9be, 0x3f76248c, 0x3f76a81e,
    0x3f7744fd, 0x3f77fbb8, 0x3f78ccdf, 0x3f79b907, 0x3f7ac0c7, 0x3f7be4ba, 0x3f7d257d, 0x3f7e83b3,
};
#endif

// 1 + e^-x, from 2^(-x / ln 2) without a second part of ln 2: relative error below 2e-7 + 1.4e-8 |x|.
INLINE Vec<float> one_plus_exp_minus(Vec<float> x) {
  x = clamp(x, -87.0f, 87.0f);
#if defined(__AVX512F__)  // a fifth faster than the polynomial alone: 9.2 cycles a vector for x / (1 + e^-x) on Zen 4
  constexpr float round = kRound / 32;
  const Vec<float> shifted = x * -1.44269504f + round, n = shifted - round;
  const Vec<float> r = x * -1.44269504f - n;  // |r| <= 1 / 64
  const __m512i power =
      _mm512_permutex2var_epi32(_mm512_load_si512(kPowers), (__m512i)shifted, _mm512_load_si512(kPowers + 16));
  const Vec<float> scale = bit_cast<Vec<float>>((Bits<float>)power + (bit_cast<Bits<float>>(shifted) << 18));
  const Vec<float> p = (r * 0.24022467f + 0.69315775f) * r + 1.0f;
  return p * scale + 1.0f;
#else
  const Vec<float> shifted = x * -1.44269504f + kRound, n = shifted - kRound;
  const Vec<float> r = x * -1.44269504f - n;
  Vec<float> p = broadcast(1.3264044e-3f);  // minimax on |r| <= 1 / 2, error 1.0e-7
  p = p * r + 9.6720455e-3f;
  p = p * r + 5.55074022e-2f;
  p = p * r + 2.402223391e-1f;
  p = p * r + 6.931469715e-1f;
  p = p * r + 1.0f;
  return 1.0f + scale_by_power(p, shifted);
#endif
}
INLINE Vec<double> one_plus_exp_minus(Vec<double> x) {
  return 1.0 + exp(-x);
}

// 2^x for x <= 0, exactly 0 from -127 down; nan stays nan. Relative error 2e-7, or kRough, for what bf16 will round,
// 6e-5.
template <bool kRough = false>
INLINE Vec<float> exp2_of_negative(Vec<float> x) {
  x = larger(broadcast(-127.f), x);
#if defined(__AVX512F__)
  constexpr float round = kRound / 32;
  const Vec<float> shifted = x + round, r = x - (shifted - round);  // |r| <= 1 / 64
  const __m512i power =
      _mm512_permutex2var_epi32(_mm512_load_si512(kPowers), (__m512i)shifted, _mm512_load_si512(kPowers + 16));
  const Vec<float> scale = bit_cast<Vec<float>>((Bits<float>)power + (bit_cast<Bits<float>>(shifted) << 18));
  const Vec<float> p = kRough ? r * 0.69314718f + 1.0f : (r * 0.24022467f + 0.69315775f) * r + 1.0f;
  return p * scale;
#else
  const Vec<float> shifted = x + kRound, r = x - (shifted - kRound);
  Vec<float> p = broadcast(1.3264044e-3f);  // minimax on |r| <= 1 / 2, error 1.0e-7
  p = p * r + 9.6720455e-3f;
  p = p * r + 5.55074022e-2f;
  p = p * r + 2.402223391e-1f;
  p = p * r + 6.931469715e-1f;
  p = p * r + 1.0f;
  return scale_by_power(p, shifted);
#endif
}
template <bool kRough = false>
INLINE Vec<double> exp2_of_negative(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp2(x[i]);
  return x;
}

// The natural logarithm of normal positive numbers, relative error below 2e-7 away from 1; nan stays nan.
INLINE Vec<float> log(Vec<float> x) {
  const Bits<float> bits = bit_cast<Bits<float>>(x), n = (bits - 0x3f3504f3) >> 23;  // x = 2^n (1 + f), from sqrt(1/2)
  const Vec<float> e = __builtin_convertvector(n, Vec<float>), f = bit_cast<Vec<float>>(bits - (n << 23)) - 1.0f;
  Vec<float> p = broadcast(7.0376836292e-2f);
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const Vec<float> square = f * f, y = f + ((p * f - 0.5f) * square - e * 2.12194440e-4f) + e * 0.693359375f;
  return select<float>(x == x, y, x);
}
INLINE Vec<double> log(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::log(x[i]);
  return x;
}

template <class T>
INLINE Vec<T> sigmoid(Vec<T> x) {
  return T(1) / one_plus_exp_minus(x);
}

INLINE Vec<float> tanh(Vec<float> x) {
  const Vec<float> a = abs<float>(x), z = x * x;
  Vec<float> p = broadcast(-5.70498872745e-3f);  // odd polynomial where 1 - 2 / (e^2x + 1) would cancel
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const Vec<float> small = x + x * z * p;
  const Vec<float> large = 1.0f - 2.0f / (exp(2.0f * a) + 1.0f);
  return select<float>(a < 0.625f, small, select<float>(x < 0.0f, -large, large));
}
INLINE Vec<double> tanh(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::tanh(x[i]);
  return x;
}

// Absolute error below 2e-7.
INLINE Vec<float> erf(Vec<float> x) {
  const Vec<float> a = abs<float>(x), z = x * x;
  Vec<float> p = broadcast(7.853861353e-5f);
  p = p * z - 8.010193625e-4f;
  p = p * z + 5.188327686e-3f;
  p = p * z - 2.685381194e-2f;
  p = p * z + 1.128358515e-1f;
  p = p * z - 3.761262582e-1f;
  p = p * z + 1.128379166f;
  const Vec<float> t = 1.0f / (1.0f + 0.3275911f * a);  // Abramowitz and Stegun 7.1.26
  Vec<float> q = broadcast(1.061405429f);
  q = q * t - 1.453152027f;
  q = q * t + 1.421413741f;
  q = q * t - 0.284496736f;
  q = q * t + 0.254829592f;
  const Vec<float> large = 1.0f - q * t * exp(-z);
  return select<float>(a < 1.0f, x * p, select<float>(x < 0.0f, -large, large));
}
INLINE Vec<double> erf(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::erf(x[i]);
  return x;
}

// Calls f.template operator()<S>() for the element type known at run time, of those that reach this instruction set
// (see capability_for) and whose sums are kept in T, if that is known.
template <class T = void, class F>
INLINE void dispatch_dtype([[maybe_unused]] Dtype dtype, const F& f) {
#if defined(__AVX512BF16__)
  f.template operator()<bf16>();
#else
  if constexpr (kVectorBytes == 16 && !std::is_same_v<T, float>)
    if (std::is_same_v<T, double> || dtype == Dtype::f64) return f.template operator()<double>();
  if constexpr (!std::is_same_v<T, double>) {
    if (dtype == Dtype::bf16) return f.template operator()<bf16>();
    if (dtype == Dtype::f16) return f.template operator()<fp16>();
    f.template operator()<float>();
  }
#endif
}

}  // namespace
}  // namespace imagegen::IMAGEGEN_CAPABILITY

#include "activate.h"  // needs the functions above
