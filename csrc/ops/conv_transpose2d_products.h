// Transposed convolution of stride 2 and padding 1 with a 4x4 or 3x3 kernel, its transpose and its weight gradient, as
// tables for common/product_conv.h.
//
// In one dimension and with four weights, y[2i] = w1 x[i] + w3 x[i-1] and y[2i+1] = w2 x[i] + w0 x[i+1]: two filters of
// two taps, each of which gives two outputs by three products where the plain way takes four,
//     y[2i] = P + w3 (x[i-1] - x[i])      y[2i+2] = P + w1 (x[i+1] - x[i])      P = (w1 + w3) x[i]
// (Winograd's F(2,2)), or four outputs by five products where the plain way takes eight (F(4,2), from the points 0, 1,
// -1, 2 and -2). In two dimensions that is 36 products for 4x4 outputs instead of 64, or 100 for 8x8 instead of 256.
// With three weights w3 is 0 and one filter has a single tap: 25 products replace 36, or 81 replace 144.
#pragma once

namespace imagegen {

// Inputs x[i-1 .. i+2], outputs y[2i .. 2i+3].
struct ConvTranspose4ForwardF2 {
  static constexpr int kStep = 2, kOffset = -1, kIn = 4, kOut = 4, kData = 5, kWeights = 6, kProducts = 6;
  static constexpr double kB[kData][kIn] = {{0, 1, 0, 0}, {0, -1, 1, 0}, {1, -1, 0, 0}, {0, 0, 1, 0}, {0, 0, -1, 1}};
  static constexpr double kG[kWeights][4] = {{0, 1, 0, 1}, {0, 1, 0, 0}, {0, 0, 0, 1},
                                             {1, 0, 1, 0}, {1, 0, 0, 0}, {0, 0, 1, 0}};
  static constexpr int kDataOf[kProducts] = {0, 1, 2, 3, 4, 1}, kWeightOf[kProducts] = {0, 1, 2, 3, 4, 5};
  static constexpr double kA[kOut][kProducts] = {
      {1, 0, 1, 0, 0, 0}, {0, 0, 0, 1, 0, -1}, {1, 1, 0, 0, 0, 0}, {0, 0, 0, 1, 1, 0}};
};

// Inputs x[i-1 .. i+4], outputs y[2i .. 2i+7]: the even ones, then the odd ones, in B, G and A alike.
struct ConvTranspose4ForwardF4 {
  static constexpr bool kLarge = true;
  static constexpr int kStep = 4, kOffset = -1, kIn = 6, kOut = 8, kData = 10, kWeights = 10, kProducts = 10;
  static constexpr double kB[kData][kIn] = {
      {4, 0, -5, 0, 1, 0}, {0, -4, -4, 1, 1, 0}, {0, 4, -4, -1, 1, 0}, {0, -2, -1, 2, 1, 0}, {0, 2, -1, -2, 1, 0},
      {0, 4, 0, -5, 0, 1}, {0, 0, -4, -4, 1, 1}, {0, 0, 4, -4, -1, 1}, {0, 0, -2, -1, 2, 1}, {0, 0, 2, -1, -2, 1}};
  static constexpr double kG[kWeights][4] = {
      {0, 0, 0, .25},           {0, -1. / 6, 0, -1. / 6},  {0, 1. / 6, 0, -1. / 6},
      {0, 1. / 12, 0, 1. / 24}, {0, -1. / 12, 0, 1. / 24}, {0, 0, .25, 0},
      {-1. / 6, 0, -1. / 6, 0}, {1. / 6, 0, -1. / 6, 0},   {1. / 12, 0, 1. / 24, 0},
      {-1. / 12, 0, 1. / 24, 0}};
  static constexpr int kDataOf[kProducts] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9},
                       kWeightOf[kProducts] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9};
  static constexpr double kA[kOut][kProducts] = {{1, 1, 1, 1, 1, 0, 0, 0, 0, 0},   {0, 0, 0, 0, 0, 1, 1, 1, 1, 1},
                                                 {0, 1, -1, 2, -2, 0, 0, 0, 0, 0}, {0, 0, 0, 0, 0, 0, 1, -1, 2, -2},
                                                 {0, 1, 1, 4, 4, 0, 0, 0, 0, 0},   {0, 0, 0, 0, 0, 0, 1, 1, 4, 4},
                                                 {0, 1, -1, 8, -8, 0, 0, 0, 0, 0}, {0, 0, 0, 0, 0, 0, 1, -1, 8, -8}};
};

// The gradient of x: gx[i] = w0 g[2i-1] + w1 g[2i] + w2 g[2i+1] + w3 g[2i+2], the odd and the even of g each filtered
// by F(2,2). Inputs g[2i-1 .. 2i+4], outputs gx[i], gx[i+1].
struct ConvTranspose4TransposeF2 {
  static constexpr int kStep = 4, kOffset = -1, kIn = 6, kOut = 2, kData = 6, kWeights = 6, kProducts = 6;
  static constexpr double kB[kData][kIn] = {{0, 0, 0, 1, 0, 0}, {0, 1, 0, -1, 0, 0}, {0, 0, 0, -1, 0, 1},
                                            {0, 0, 1, 0, 0, 0}, {1, 0, -1, 0, 0, 0}, {0, 0, -1, 0, 1, 0}};
  static constexpr const auto& kG = ConvTranspose4ForwardF2::kG;
  static constexpr int kDataOf[kProducts] = {0, 1, 2, 3, 4, 5}, kWeightOf[kProducts] = {0, 1, 2, 3, 4, 5};
  static constexpr double kA[kOut][kProducts] = {{1, 1, 0, 1, 1, 0}, {1, 0, 1, 1, 0, 1}};
};

// Inputs g[2i-1 .. 2i+8], outputs gx[i .. i+3]: the even of g, then the odd.
struct ConvTranspose4TransposeF4 {
  static constexpr bool kLarge = true;
  static constexpr int kStep = 8, kOffset = -1, kIn = 10, kOut = 4, kData = 10, kWeights = 10, kProducts = 10;
  static constexpr double kB[kData][kIn] = {{0, 4, 0, 0, 0, -5, 0, 0, 0, 1},  {0, 0, 0, -4, 0, -4, 0, 1, 0, 1},
                                            {0, 0, 0, 4, 0, -4, 0, -1, 0, 1}, {0, 0, 0, -2, 0, -1, 0, 2, 0, 1},
                                            {0, 0, 0, 2, 0, -1, 0, -2, 0, 1}, {4, 0, 0, 0, -5, 0, 0, 0, 1, 0},
                                            {0, 0, -4, 0, -4, 0, 1, 0, 1, 0}, {0, 0, 4, 0, -4, 0, -1, 0, 1, 0},
                                            {0, 0, -2, 0, -1, 0, 2, 0, 1, 0}, {0, 0, 2, 0, -1, 0, -2, 0, 1, 0}};
  static constexpr double kG[kWeights][4] = {
      {0, .25, 0, 0},           {0, -1. / 6, 0, -1. / 6},  {0, -1. / 6, 0, 1. / 6},
      {0, 1. / 24, 0, 1. / 12}, {0, 1. / 24, 0, -1. / 12}, {.25, 0, 0, 0},
      {-1. / 6, 0, -1. / 6, 0}, {-1. / 6, 0, 1. / 6, 0},   {1. / 24, 0, 1. / 12, 0},
      {1. / 24, 0, -1. / 12, 0}};
  static constexpr int kDataOf[kProducts] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9},
                       kWeightOf[kProducts] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9};
  static constexpr double kA[kOut][kProducts] = {{1, 1, 1, 1, 1, 1, 1, 1, 1, 1},
                                                 {0, 1, -1, 2, -2, 0, 1, -1, 2, -2},
                                                 {0, 1, 1, 4, 4, 0, 1, 1, 4, 4},
                                                 {0, 1, -1, 8, -8, 0, 1, -1, 8, -8}};
};

// The gradient of the weights: the products of the transpose by F(2,2), with sums of x in place of the weights.
struct ConvTranspose4WeightF2 {
  using Input = ConvTranspose4TransposeF2;
  struct Gradient {
    static constexpr int kStep = 2, kOffset = 0, kIn = 2, kData = 3;
    static constexpr double kB[kData][kIn] = {{1, 1}, {1, 0}, {0, 1}};
  };
  static constexpr int kWeights = 6, kProducts = 6;
  static constexpr const auto& kG = ConvTranspose4ForwardF2::kG;
  static constexpr const auto& kWeightOf = ConvTranspose4TransposeF2::kWeightOf;
  static constexpr int kInputOf[kProducts] = {0, 1, 2, 3, 4, 5}, kGradientOf[kProducts] = {0, 1, 2, 0, 1, 2};
};

// Inputs x[i .. i+2], outputs y[2i .. 2i+3].
struct ConvTranspose3ForwardF2 {
  static constexpr int kStep = 2, kOffset = 0, kIn = 3, kOut = 4, kData = 4, kWeights = 4, kProducts = 5;
  static constexpr double kB[kData][kIn] = {{1, 0, 0}, {0, 1, 0}, {0, -1, 1}, {-1, 1, 0}};
  static constexpr double kG[kWeights][3] = {{0, 1, 0}, {1, 0, 1}, {1, 0, 0}, {0, 0, 1}};
  static constexpr int kDataOf[kProducts] = {0, 1, 1, 2, 3}, kWeightOf[kProducts] = {0, 0, 1, 2, 3};
  static constexpr double kA[kOut][kProducts] = {{1, 0, 0, 0, 0}, {0, 0, 1, 0, -1}, {0, 1, 0, 0, 0}, {0, 0, 1, 1, 0}};
};

// Inputs x[i .. i+4], outputs y[2i .. 2i+7]: the even ones take x as it is.
struct ConvTranspose3ForwardF4 {
  static constexpr bool kLarge = true;
  static constexpr int kStep = 4, kOffset = 0, kIn = 5, kOut = 8, kData = 9, kWeights = 6, kProducts = 9;
  static constexpr double kB[kData][kIn] = {{1, 0, 0, 0, 0},   {0, 1, 0, 0, 0},   {0, 0, 1, 0, 0},
                                            {0, 0, 0, 1, 0},   {4, 0, -5, 0, 1},  {0, -4, -4, 1, 1},
                                            {0, 4, -4, -1, 1}, {0, -2, -1, 2, 1}, {0, 2, -1, -2, 1}};
  static constexpr double kG[kWeights][3] = {{0, 1, 0},
                                             {0, 0, .25},
                                             {-1. / 6, 0, -1. / 6},
                                             {1. / 6, 0, -1. / 6},
                                             {1. / 12, 0, 1. / 24},
                                             {-1. / 12, 0, 1. / 24}};
  static constexpr int kDataOf[kProducts] = {0, 1, 2, 3, 4, 5, 6, 7, 8},
                       kWeightOf[kProducts] = {0, 0, 0, 0, 1, 2, 3, 4, 5};
  static constexpr double kA[kOut][kProducts] = {{1, 0, 0, 0, 0, 0, 0, 0, 0}, {0, 0, 0, 0, 1, 1, 1, 1, 1},
                                                 {0, 1, 0, 0, 0, 0, 0, 0, 0}, {0, 0, 0, 0, 0, 1, -1, 2, -2},
                                                 {0, 0, 1, 0, 0, 0, 0, 0, 0}, {0, 0, 0, 0, 0, 1, 1, 4, 4},
                                                 {0, 0, 0, 1, 0, 0, 0, 0, 0}, {0, 0, 0, 0, 0, 1, -1, 8, -8}};
};

// Inputs g[2i-1 .. 2i+3], outputs gx[i], gx[i+1].
struct ConvTranspose3TransposeF2 {
  static constexpr int kStep = 4, kOffset = -1, kIn = 5, kOut = 2, kData = 5, kWeights = 4, kProducts = 5;
  static constexpr double kB[kData][kIn] = {
      {0, 1, 0, 0, 0}, {0, 0, 0, 1, 0}, {0, 0, 1, 0, 0}, {1, 0, -1, 0, 0}, {0, 0, -1, 0, 1}};
  static constexpr const auto& kG = ConvTranspose3ForwardF2::kG;
  static constexpr int kDataOf[kProducts] = {0, 1, 2, 3, 4}, kWeightOf[kProducts] = {0, 0, 1, 2, 3};
  static constexpr double kA[kOut][kProducts] = {{1, 0, 1, 1, 0}, {0, 1, 1, 0, 1}};
};

// Inputs g[2i-1 .. 2i+7], outputs gx[i .. i+3].
struct ConvTranspose3TransposeF4 {
  static constexpr bool kLarge = true;
  static constexpr int kStep = 8, kOffset = -1, kIn = 9, kOut = 4, kData = 9, kWeights = 6, kProducts = 9;
  static constexpr double kB[kData][kIn] = {
      {0, 1, 0, 0, 0, 0, 0, 0, 0},   {0, 0, 0, 1, 0, 0, 0, 0, 0},   {0, 0, 0, 0, 0, 1, 0, 0, 0},
      {0, 0, 0, 0, 0, 0, 0, 1, 0},   {4, 0, 0, 0, -5, 0, 0, 0, 1},  {0, 0, -4, 0, -4, 0, 1, 0, 1},
      {0, 0, 4, 0, -4, 0, -1, 0, 1}, {0, 0, -2, 0, -1, 0, 2, 0, 1}, {0, 0, 2, 0, -1, 0, -2, 0, 1}};
  static constexpr double kG[kWeights][3] = {{0, 1, 0},
                                             {.25, 0, 0},
                                             {-1. / 6, 0, -1. / 6},
                                             {-1. / 6, 0, 1. / 6},
                                             {1. / 24, 0, 1. / 12},
                                             {1. / 24, 0, -1. / 12}};
  static constexpr int kDataOf[kProducts] = {0, 1, 2, 3, 4, 5, 6, 7, 8},
                       kWeightOf[kProducts] = {0, 0, 0, 0, 1, 2, 3, 4, 5};
  static constexpr double kA[kOut][kProducts] = {{1, 0, 0, 0, 1, 1, 1, 1, 1},
                                                 {0, 1, 0, 0, 0, 1, -1, 2, -2},
                                                 {0, 0, 1, 0, 0, 1, 1, 4, 4},
                                                 {0, 0, 0, 1, 0, 1, -1, 8, -8}};
};

struct ConvTranspose3WeightF2 {
  using Input = ConvTranspose3TransposeF2;
  struct Gradient {
    static constexpr int kStep = 2, kOffset = 0, kIn = 2, kData = 3;
    static constexpr double kB[kData][kIn] = {{1, 0}, {0, 1}, {1, 1}};
  };
  static constexpr int kWeights = 4, kProducts = 5;
  static constexpr const auto& kG = ConvTranspose3ForwardF2::kG;
  static constexpr const auto& kWeightOf = ConvTranspose3TransposeF2::kWeightOf;
  static constexpr int kInputOf[kProducts] = {0, 1, 2, 3, 4}, kGradientOf[kProducts] = {0, 1, 2, 0, 1};
};

// Up to four output channels: which products with the weights meet in an output of either parity.
struct ConvTranspose4Few {
  static constexpr int kScale = 2, kSpan = 2;
  static constexpr int kTaps[kScale][kSpan][4] = {{{0, 0, 0, 1}, {0, 1, 0, 0}}, {{0, 0, 1, 0}, {1, 0, 0, 0}}};
};

struct ConvTranspose3Few {
  static constexpr int kScale = 2, kSpan = 2;
  static constexpr int kTaps[kScale][kSpan][3] = {{{0, 0, 0}, {0, 1, 0}}, {{0, 0, 1}, {1, 0, 0}}};
};

}  // namespace imagegen
