// The activations and their derivatives, one source for the CPU's vectors and for a CUDA thread's scalars: simd.h and
// scalar.cuh define what a Vec is, the elementary functions of one, and include this file.
#pragma once
#include "activation.h"

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

template <Activation A, class T>
INLINE Vec<T> activate(Vec<T> x, T alpha = T(kLreluSlope)) {
  if constexpr (A == Activation::relu) return select<T>(x < T(0), Vec<T>{}, x);
  if constexpr (A == Activation::lrelu) return select<T>(x < T(0), x * alpha, x);
  if constexpr (A == Activation::silu) return x / one_plus_exp_minus(x);
  if constexpr (A == Activation::gelu) return T(0.5) * x * (T(1) + erf(x * T(0.70710678118654752)));
  if constexpr (A == Activation::tanh) return tanh(x);
  if constexpr (A == Activation::sigmoid) return sigmoid<T>(x);
  return x;
}

// d activate(x) / dx
template <Activation A, class T>
INLINE Vec<T> activate_derivative(Vec<T> x, T alpha = T(kLreluSlope)) {
  const Vec<T> one = broadcast(T(1));
  if constexpr (A == Activation::relu) return select<T>(x > T(0), one, Vec<T>{});
  if constexpr (A == Activation::lrelu) return select<T>(x > T(0), one, broadcast(alpha));
  if constexpr (A == Activation::silu) {
    const Vec<T> s = sigmoid<T>(x);
    return s * (one + x * (one - s));
  }
  if constexpr (A == Activation::gelu)
    return T(0.5) * (one + erf(x * T(0.70710678118654752))) + x * T(0.39894228040143268) * exp(T(-0.5) * x * x);
  if constexpr (A == Activation::tanh) {
    const Vec<T> t = tanh(x);
    return one - t * t;
  }
  if constexpr (A == Activation::sigmoid) {
    const Vec<T> s = sigmoid<T>(x);
    return s * (one - s);
  }
  return one;
}

// Calls f.template operator()<A>() for the activation known at run time.
template <class F>
inline auto dispatch_activation(Activation activation, const F& f) {
  switch (activation) {
    case Activation::linear: return f.template operator()<Activation::linear>();
    case Activation::relu: return f.template operator()<Activation::relu>();
    case Activation::lrelu: return f.template operator()<Activation::lrelu>();
    case Activation::silu: return f.template operator()<Activation::silu>();
    case Activation::gelu: return f.template operator()<Activation::gelu>();
    case Activation::tanh: return f.template operator()<Activation::tanh>();
    default: return f.template operator()<Activation::sigmoid>();
  }
}

}  // namespace
}  // namespace imagegen::IMAGEGEN_CAPABILITY
