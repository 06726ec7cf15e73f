// The activations by number: the order is the one of ACTIVATIONS in imagegen/ops/_activation.py.
#pragma once

namespace imagegen {

enum class Activation : int { linear, relu, lrelu, silu, gelu, tanh, sigmoid };

constexpr double kLreluSlope = 0.2;

}  // namespace imagegen
