#pragma once

namespace imagegen {

// What computes a 3x3 convolution; conv2d_kernel.cpp chooses by shape and dtype.
enum class Conv2dAlgorithm : int { winograd_f4, winograd_f2, direct };

}  // namespace imagegen
