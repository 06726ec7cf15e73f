// 3x3 convolution with padding 1 as tables for common/product_conv.h: Winograd's minimal filtering.
//
// F(4,3) takes 36 products for 4x4 outputs where the plain way takes 144, from the points 0, 1, -1, 2, -2 and infinity;
// F(2,3) takes 16 for 2x2 (36), from 0, 1, -1 and infinity, with a tenth of the error. Lavin and Gray, "Fast Algorithms
// for Convolutional Neural Networks", 2016.
#pragma once

namespace imagegen {

struct WinogradF4 {
  static constexpr bool kLarge = true;
  static constexpr int kStep = 4, kOffset = -1, kIn = 6, kOut = 4, kData = 6, kWeights = 6, kProducts = 6;
  static constexpr double kB[kData][kIn] = {{4, 0, -5, 0, 1, 0},  {0, -4, -4, 1, 1, 0}, {0, 4, -4, -1, 1, 0},
                                            {0, -2, -1, 2, 1, 0}, {0, 2, -1, -2, 1, 0}, {0, 4, 0, -5, 0, 1}};
  static constexpr double kG[kWeights][3] = {{.25, 0, 0},
                                             {-1. / 6, -1. / 6, -1. / 6},
                                             {-1. / 6, 1. / 6, -1. / 6},
                                             {1. / 24, 1. / 12, 1. / 6},
                                             {1. / 24, -1. / 12, 1. / 6},
                                             {0, 0, 1}};
  static constexpr int kDataOf[kProducts] = {0, 1, 2, 3, 4, 5}, kWeightOf[kProducts] = {0, 1, 2, 3, 4, 5};
  static constexpr double kA[kOut][kProducts] = {
      {1, 1, 1, 1, 1, 0}, {0, 1, -1, 2, -2, 0}, {0, 1, 1, 4, 4, 0}, {0, 1, -1, 8, -8, 1}};
};

struct WinogradF2 {
  static constexpr int kStep = 2, kOffset = -1, kIn = 4, kOut = 2, kData = 4, kWeights = 4, kProducts = 4;
  static constexpr double kB[kData][kIn] = {{1, 0, -1, 0}, {0, 1, 1, 0}, {0, -1, 1, 0}, {0, 1, 0, -1}};
  static constexpr double kG[kWeights][3] = {{1, 0, 0}, {.5, .5, .5}, {.5, -.5, .5}, {0, 0, 1}};
  static constexpr int kDataOf[kProducts] = {0, 1, 2, 3}, kWeightOf[kProducts] = {0, 1, 2, 3};
  static constexpr double kA[kOut][kProducts] = {{1, 1, 1, 0}, {0, 1, -1, -1}};
};

// The gradient of the weights in the transformed domain: input data times A^T of the gradient, summed over the tiles.
struct WinogradF4Weight {
  using Input = WinogradF4;
  struct Gradient {
    static constexpr int kStep = 4, kOffset = 0, kIn = 4, kData = 6;
    static constexpr double kB[kData][kIn] = {{1, 0, 0, 0}, {1, 1, 1, 1},   {1, -1, 1, -1},
                                              {1, 2, 4, 8}, {1, -2, 4, -8}, {0, 0, 0, 1}};
  };
  static constexpr int kWeights = 6, kProducts = 6;
  static constexpr const auto& kG = WinogradF4::kG;
  static constexpr const auto& kWeightOf = WinogradF4::kWeightOf;
  static constexpr int kInputOf[kProducts] = {0, 1, 2, 3, 4, 5}, kGradientOf[kProducts] = {0, 1, 2, 3, 4, 5};
};

// Up to four output channels, where panels of 32 would be mostly empty.
struct Conv2dFew {
  static constexpr int kScale = 1, kSpan = 3;
  static constexpr int kTaps[kScale][kSpan][3] = {{{1, 0, 0}, {0, 1, 0}, {0, 0, 1}}};
};

}  // namespace imagegen
