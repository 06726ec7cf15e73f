// One point of bias_act, for the CPU's vectors and a CUDA thread's scalars alike; include after simd.h or scalar.cuh.
#pragma once
#include "common/activate.h"

namespace imagegen::IMAGEGEN_CAPABILITY {
namespace {

// The output for z = x + b; or, kBackward, the gradient of x for the output's gradient.
template <Activation A, bool kBackward, class T>
INLINE Vec<T> bias_act_point(Vec<T> z, Vec<T> grad, T alpha, T gain, T clamp) {
  const Vec<T> y = activate<A, T>(z, alpha) * gain;
  if constexpr (kBackward)
    return select<T>(abs<T>(y) > clamp, Vec<T>{}, grad * (activate_derivative<A, T>(z, alpha) * gain));
  return select<T>(y > clamp, broadcast(clamp), select<T>(y < -clamp, broadcast(-clamp), y));  // lets nan through
}

}  // namespace
}  // namespace imagegen::IMAGEGEN_CAPABILITY
