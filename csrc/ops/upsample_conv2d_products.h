// Nearest-2x upsampling and 3x3 convolution, and its transpose, as tables for common/product_conv.h.
//
// In one dimension y[2i] = w0 x[i-1] + (w1 + w2) x[i] and y[2i+1] = (w0 + w1) x[i] + w2 x[i+1]. Write n neighbouring
// pixels as a sum of exponentials, x[i] = sum of a_q q^i over n numbers q. Each keeps its form when shifted by a pixel:
// it gives (w0 / q + w1 + w2) a_q q^i to y[2i] and (w0 + w1 + w2 q) a_q q^i to y[2i+1], two products, but for q = 1
// one, for both weights are w0 + w1 + w2. Beyond the n pixels the sum is not x: w0 times the difference of its value
// there and x[-1] mends the first output, w2 times that to x[n] the last. Together 2n + 1 products for 2n outputs: for
// n = 2, in two dimensions, 25 where the plain way takes 144, for n = 4 81 where it takes 576.
#pragma once

namespace imagegen {

// q = 1, -1.
struct UpsampleForward2 {
  static constexpr int kStep = 2, kOffset = -1, kIn = 4, kOut = 4, kData = 4, kWeights = 5, kProducts = 5;
  static constexpr double kB[kData][kIn] = {{0, 1, 1, 0}, {0, 1, -1, 0}, {1, 0, -1, 0}, {0, -1, 0, 1}};
  static constexpr double kG[kWeights][3] = {{.5, .5, .5}, {.5, -.5, -.5}, {.5, .5, -.5}, {1, 0, 0}, {0, 0, 1}};
  static constexpr int kDataOf[kProducts] = {0, 1, 1, 2, 3}, kWeightOf[kProducts] = {0, 1, 2, 3, 4};
  static constexpr double kA[kOut][kProducts] = {{1, -1, 0, 1, 0}, {1, 0, 1, 0, 0}, {1, 1, 0, 0, 0}, {1, 0, -1, 0, 1}};
};

// q = 1, -1, 1/2, -2. Errs by 1 to 2e-6, three to eight times what UpsampleForward2 does and half of what Winograd's
// F(4,3) would.
struct UpsampleForward4 {
  static constexpr bool kLarge = true;
  static constexpr int kStep = 4, kOffset = -1, kIn = 6, kOut = 8, kData = 6, kWeights = 9, kProducts = 9;
  static constexpr double kB[kData][kIn] = {{0, -2, 1, 5, 2, 0},  {0, -2, 5, -1, -2, 0}, {0, 2, 1, -2, -1, 0},
                                            {0, 1, -2, -1, 2, 0}, {2, -3, -4, 3, 2, 0},  {0, 2, -3, -4, 3, 2}};
  static constexpr double kG[kWeights][3] = {{1. / 6, 1. / 6, 1. / 6},
                                             {1. / 6, -1. / 6, -1. / 6},
                                             {2. / 15, 1. / 15, 1. / 15},
                                             {1. / 30, -1. / 15, -1. / 15},
                                             {.5, 0, 0},
                                             {-1. / 6, -1. / 6, 1. / 6},
                                             {1. / 15, 1. / 15, 1. / 30},
                                             {-1. / 15, -1. / 15, 2. / 15},
                                             {0, 0, .5}};
  static constexpr int kDataOf[kProducts] = {0, 1, 2, 3, 4, 1, 2, 3, 5},
                       kWeightOf[kProducts] = {0, 1, 2, 3, 4, 5, 6, 7, 8};
  static constexpr double kA[kOut][kProducts] = {{1, 1, 8, 1, 1, 0, 0, 0, 0},   {1, 0, 0, 0, 0, 1, 8, 1, 0},
                                                 {1, -1, 4, -2, 0, 0, 0, 0, 0}, {1, 0, 0, 0, 0, -1, 4, -2, 0},
                                                 {1, 1, 2, 4, 0, 0, 0, 0, 0},   {1, 0, 0, 0, 0, 1, 2, 4, 0},
                                                 {1, -1, 1, -8, 0, 0, 0, 0, 0}, {1, 0, 0, 0, 0, -1, 1, -8, 1}};
};

// The gradient of x: with e[k] = g[k] + g[k+1] it is gx[i] = w2 e[2i-1] + w1 e[2i] + w0 e[2i+1], and two neighbours
// share (w0 + w2) e[2i+1]. Inputs are g[4t-1 .. 4t+4], outputs gx[2t], gx[2t+1].
struct UpsampleTranspose {
  static constexpr int kStep = 4, kOffset = -1, kIn = 6, kOut = 2, kData = 5, kWeights = 4, kProducts = 5;
  static constexpr double kB[kData][kIn] = {
      {1, 1, -1, -1, 0, 0}, {0, 0, 1, 1, 0, 0}, {0, 0, -1, -1, 1, 1}, {0, 1, 1, 0, 0, 0}, {0, 0, 0, 1, 1, 0}};
  static constexpr double kG[kWeights][3] = {{0, 0, 1}, {1, 0, 1}, {1, 0, 0}, {0, 1, 0}};
  static constexpr int kDataOf[kProducts] = {0, 1, 2, 3, 4}, kWeightOf[kProducts] = {0, 1, 2, 3, 3};
  static constexpr double kA[kOut][kProducts] = {{1, 1, 0, 1, 0}, {0, 1, 1, 0, 1}};
};

// The gradient of the weights: the products of UpsampleTranspose, with sums of x in place of the weights. Products of
// one weight add up, so 16 sums serve 25 products.
struct UpsampleWeight {
  struct Input {
    static constexpr int kStep = 2, kOffset = 0, kIn = 2, kData = 3;
    static constexpr double kB[kData][kIn] = {{1, 0}, {1, 1}, {0, 1}};
  };
  using Gradient = UpsampleTranspose;
  static constexpr int kWeights = 4, kProducts = 5;
  static constexpr const auto& kG = UpsampleTranspose::kG;
  static constexpr const auto& kWeightOf = UpsampleTranspose::kWeightOf;
  static constexpr int kInputOf[kProducts] = {0, 1, 2, 0, 2}, kGradientOf[kProducts] = {0, 1, 2, 3, 4};
};

// Up to four output channels, where panels of 32 would be mostly empty: which products with the nine weights meet in an
// output of either parity.
struct UpsampleFew {
  static constexpr int kScale = 2, kSpan = 2;
  static constexpr int kTaps[kScale][kSpan][3] = {{{1, 0, 0}, {0, 1, 1}}, {{1, 1, 0}, {0, 0, 1}}};
};

}  // namespace imagegen
