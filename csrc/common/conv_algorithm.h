// What computes a convolution, and by what it is chosen.
#pragma once
#include "scalar.h"

namespace imagegen {

// Directly to few output channels; 3x3 from few input channels by F(2,3) along the rows; else by products with small or
// with large tiles, as F(2,3) or F(4,3) in two dimensions.
enum class ConvAlgorithm : int { direct, rows, small_tiles, large_tiles };

// One image: the batch has no say, lest an image's result depend on its company.
struct ConvShape {
  Dtype dtype;
  int64_t cin, cout, out_h, out_w;
};

// Names, as `imagegen.info` prints them; each op runs what its function here says.
const char* conv2d_algorithm_name(const ConvShape& shape);
const char* conv_transpose2d_algorithm_name(int64_t kernel, const ConvShape& shape);
const char* upsample_conv2d_algorithm_name(const ConvShape& shape);

}  // namespace imagegen
