// The arithmetic of one CUDA thread: what simd.h is to CPU kernels, for vectors of one lane, so that headers of
// formulas (activate.h) serve both.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math.h>

#include <cstdint>

#include "scalar.h"

#define IMAGEGEN_CAPABILITY cuda
#define INLINE __host__ __device__ __forceinline__

namespace imagegen::cuda {
namespace {

template <class T>
using Vec = T;

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

INLINE float to_compute(float s) {
  return s;
}
INLINE double to_compute(double s) {
  return s;
}
INLINE float to_compute(bf16 s) {
  return __bfloat162float(__nv_bfloat16(__nv_bfloat16_raw{s.bits}));
}
INLINE float to_compute(fp16 s) {
  return __half2float(__half(__half_raw{s.bits}));
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
  return {static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(v)).x};
}
template <>
INLINE fp16 from_compute<fp16>(float v) {
  return {static_cast<__half_raw>(__float2half_rn(v)).x};
}

template <class T>
INLINE T broadcast(T s) {
  return s;
}
template <class T>
INLINE T select(bool condition, T a, T b) {
  return condition ? a : b;
}
template <class T>
INLINE T abs(T v) {
  return v < T(0) ? -v : v;
}

INLINE float exp(float x) {
  return ::expf(x);
}
INLINE double exp(double x) {
  return ::exp(x);
}
INLINE float tanh(float x) {
  return ::tanhf(x);
}
INLINE double tanh(double x) {
  return ::tanh(x);
}
INLINE float erf(float x) {
  return ::erff(x);
}
INLINE double erf(double x) {
  return ::erf(x);
}
template <class T>
INLINE T one_plus_exp_minus(T x) {
  return T(1) + exp(-x);
}
template <class T>
INLINE T sigmoid(T x) {
  return T(1) / one_plus_exp_minus(x);
}

// 16 bytes of elements: one load or store instruction.
template <class S>
constexpr int kPackSize = 16 / sizeof(S);
template <class S>
struct alignas(16) Pack {
  S at[kPackSize<S>];
};

// load(p, n) reads the first n elements where there are fewer than a pack's; store(p, pack, n) writes n. p is aligned.
template <class S>
INLINE Pack<S> load(const S* p, int64_t n) {
  if (n >= kPackSize<S>) return *reinterpret_cast<const Pack<S>*>(p);
  Pack<S> pack{};
#pragma unroll
  for (int i = 0; i < kPackSize<S>; ++i)
    if (i < n) pack.at[i] = p[i];
  return pack;
}
template <class S>
INLINE void store(S* p, const Pack<S>& pack, int64_t n) {
  if (n >= kPackSize<S>) {
    *reinterpret_cast<Pack<S>*>(p) = pack;
    return;
  }
#pragma unroll
  for (int i = 0; i < kPackSize<S>; ++i)
    if (i < n) p[i] = pack.at[i];
}

// Calls f.template operator()<S>() for the element type known at run time.
template <class F>
auto dispatch_dtype(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::f32: return f.template operator()<float>();
    case Dtype::f64: return f.template operator()<double>();
    case Dtype::bf16: return f.template operator()<bf16>();
    default: return f.template operator()<fp16>();
  }
}

// The same for kernels on tensor cores, which do not multiply double.
template <class F>
auto dispatch_element(Dtype dtype, const F& f) {
  switch (dtype) {
    case Dtype::f32: return f.template operator()<float>();
    case Dtype::bf16: return f.template operator()<bf16>();
    default: return f.template operator()<fp16>();
  }
}

// What tensor cores multiply: elements, float as three products of its parts; or Tf32, which is float rounded to ten
// bits behind the point, in one product.
struct Tf32 {};
template <class Factor>
struct ElementOf {
  using type = Factor;
};
template <>
struct ElementOf<Tf32> {
  using type = float;
};
template <class Factor>
using Element = typename ElementOf<Factor>::type;
template <class F>
auto dispatch_factor(Dtype dtype, bool allow_tf32, const F& f) {
  if (dtype == Dtype::f32 && allow_tf32) return f.template operator()<Tf32>();
  return dispatch_element(dtype, f);
}

}  // namespace
}  // namespace imagegen::cuda

#include "activate.h"  // needs the functions above

namespace imagegen::cuda {
namespace {

// The activation known at run time: a branch that all threads take alike.
__device__ __forceinline__ float activate(Activation activation, float x) {
  switch (activation) {
    case Activation::linear: return x;
    case Activation::relu: return activate<Activation::relu, float>(x);
    case Activation::lrelu: return activate<Activation::lrelu, float>(x);
    case Activation::silu: return activate<Activation::silu, float>(x);
    case Activation::gelu: return activate<Activation::gelu, float>(x);
    case Activation::tanh: return activate<Activation::tanh, float>(x);
    default: return activate<Activation::sigmoid, float>(x);
  }
}

}  // namespace
}  // namespace imagegen::cuda
