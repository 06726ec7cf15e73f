// The gradient of upsample_conv2d's x on tensor cores (mma.sync, sm_80 and later). Transposed, the nine products have
// one sum: with g0 = gy[2i] and g1 = gy[2i+1] in one dimension
//   gx[i] = S (g0[i] + g1[i]) + w0 (g0[i+1] - g0[i]) + w2 (g1[i-1] - g1[i])
//
// A block owns kHeight x 8 pixels of gx and 64 of its channels. In shared memory the four phases of gy, (row, column)
// even or odd, lie apart, each with the row and column more that a neighbour needs, so that left operands are eight
// pixels beside each other as in the forward.
#include "upsample_conv2d_tile.cuh"

namespace imagegen::cuda {
namespace {

// Predicted for (1, 512, 128, 128) in bf16 with Wide: tensor cores 163 us on H200; shared memory 172, as a warp reads
// 152 times 128 bytes for 72 products; L2, 16 bytes of patch and 36 of weights a pixel and channel, 130 us.
template <class Factor_, int kWarpsOfPixels>
struct Traits {
  using Factor = Factor_;
  using S = Element<Factor>;
  static constexpr int kFragments = 2, kStages = 2, kWarpsOfChannels = 2;
  static constexpr int kWarpHeight = 2 * kFragments, kHeight = kWarpHeight * kWarpsOfPixels, kWidth = 8;
  static constexpr int kGroups = 2;  // of 16 channels, to a warp
  static constexpr int kChannels = 16 * kGroups * kWarpsOfChannels;
  static constexpr int kThreads = 32 * kWarpsOfPixels * kWarpsOfChannels;
  static constexpr int kChunk = kStep<S>;
  static constexpr int kPhaseHeight = kHeight + 1, kPhaseWidth = kWidth + 1, kPhase = kPhaseHeight * kPhaseWidth;
  using Patch = PatchCopies<S, kThreads, 4 * kPhase, kChunk / kPackSize<S>>;
  static constexpr int kWeights = 9 * kChunk * kChannels;
  static constexpr int kStage = Patch::kSize + kWeights;
  static constexpr int kSharedBytes = kStages * kStage * static_cast<int>(sizeof(S));
  static_assert(kSharedBytes <= 99 * 1024, "what sm_86, sm_89 and sm_120 give a block");
  static_assert(kSharedBytes >= kHeight * kWidth * (kChannels + 4) * static_cast<int>(sizeof(float)), "results fit");
};
template <class F>
using Wide = Traits<F, 4>;  // 16 x 8 pixels
template <class F>
using Small = Traits<F, 2>;  // 8 x 8

// Of one column of gy, or of a sum or difference of two: even rows {0, 1}, {2, 3} of the warp, odd rows likewise, and
// {odd row -1, even row 4}.
template <class T>
struct Column {
  using S = typename T::S;
  Fragment even[T::kFragments], odd[T::kFragments], outer;

  // p: the warp's first even row; parity: of the column; j: pixels to the right.
  static __device__ __forceinline__ Column load(const S* p, int parity, int j) {
    constexpr int kRow = T::Patch::kRow, kLine = T::kPhaseWidth * kRow;
    const int lane = threadIdx.x % 32, second = lane / 8 % 2;
    p += (parity * T::kPhase + j + lane % 8) * kRow + lane / 16 * kPackSize<S>;
    const S* const odd_rows = p + 2 * T::kPhase * kRow;
    Column v;
#pragma unroll
    for (int m = 0; m < T::kFragments; ++m) {
      load_matrices(v.even[m].r, p + (2 * m + second) * kLine);
      load_matrices(v.odd[m].r, odd_rows + (2 * m + 1 + second) * kLine);
    }
    load_matrices(v.outer.r, second ? p + 2 * T::kFragments * kLine : odd_rows);
    return v;
  }
  template <class Combine>
  static __device__ __forceinline__ Column of(const Column& a, const Column& b, const Combine& combine) {
    Column v;
#pragma unroll
    for (int m = 0; m < T::kFragments; ++m)
      v.even[m] = combine(a.even[m], b.even[m]), v.odd[m] = combine(a.odd[m], b.odd[m]);
    v.outer = combine(a.outer, b.outer);
    return v;
  }
  // use(row type, operand) for the three row types.
  template <class Use>
  __device__ __forceinline__ void by_rows(const Use& use) const {
    Fragment a[T::kFragments];
#pragma unroll
    for (int m = 0; m < T::kFragments; ++m) a[m] = plus<S>(even[m], odd[m]);
    use(0, a);
#pragma unroll
    for (int m = 0; m < T::kFragments; ++m)
      a[m] = minus<S>(m + 1 < T::kFragments ? rows(even[m], 1, even[m + 1], 0) : rows(even[m], 1, outer, 1), even[m]);
    use(1, a);
#pragma unroll
    for (int m = 0; m < T::kFragments; ++m)
      a[m] = minus<S>(m ? rows(odd[m - 1], 1, odd[m], 0) : rows(outer, 0, odd[m], 0), odd[m]);
    use(2, a);
  }
};

template <class T>
__global__ void __launch_bounds__(T::kThreads) backward_input_kernel(const __grid_constant__ UpsampleConv2dParams p) {
  using S = typename T::S;
  using Patch = typename T::Patch;
  S* const shared = dynamic_shared<S>();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_row = warp / T::kWarpsOfChannels * T::kWarpHeight;
  const int warp_group = warp % T::kWarpsOfChannels * T::kGroups;
  const int64_t tiles_w = (p.width + T::kWidth - 1) / T::kWidth, tiles_h = (p.height + T::kHeight - 1) / T::kHeight;
  const int64_t b = blockIdx.x / (tiles_w * tiles_h), tile = blockIdx.x % (tiles_w * tiles_h);
  const int64_t i0 = tile / tiles_w * T::kHeight, j0 = tile % tiles_w * T::kWidth;
  const int chunks = (p.x.channels + T::kChunk - 1) / T::kChunk;
  const S* const grad = static_cast<const S*>(p.x.p) + b * p.x.batch_stride;
  const WeightCopies<S, T::kThreads, T::kChannels> weight(p, int64_t{blockIdx.y} * T::kChannels);

  // Even rows and columns begin with the tile, odd ones one before it.
  const Patch patch([&](int pixel) {
    const int phase = pixel / T::kPhase, row = phase / 2, column = phase % 2, in_phase = pixel % T::kPhase;
    const int64_t i = 2 * (i0 + in_phase / T::kPhaseWidth) - row, j = 2 * (j0 + in_phase % T::kPhaseWidth) - column;
    return pixel_place<S>(p.x, i, j, 2 * p.height, 2 * p.width);
  });
  const auto load = [&](int stage, int chunk) {
    S* const to = shared + stage * T::kStage;
    patch.issue(to, grad, chunk * T::kChunk, p.x.channels);
    weight.template issue<9, 1>(to + Patch::kSize, chunk * 9);  // the products need the registers
  };

  float sum[T::kGroups][T::kFragments][2][4] = {};  // [16 channels][two rows of pixels][8 channels]
  for_each_chunk<T::kStages>(chunks, load, [&](int stage) {
    const S* const at = shared + stage * T::kStage;
    const S* const pixels = at + warp_row * T::kPhaseWidth * Patch::kRow;
    const S* const weights = at + Patch::kSize + (warp_group * 32 + lane) * kPackSize<S>;
    const auto products = [&](int column, const Column<T>& v) {
      v.by_rows([&](int row, const Fragment(&a)[T::kFragments]) {
#pragma unroll
        for (int g = 0; g < T::kGroups; ++g) {
          uint32_t w[4];
          load_matrices(w, weights + ((3 * column + row) * T::kChannels + g * 16) * kStep<S>);
          multiply(sum[g], a, w, typename T::Factor{});
        }
      });
    };
    const auto even = Column<T>::load(pixels, 0, 0), odd = Column<T>::load(pixels, 1, 1);
    products(0, Column<T>::of(even, odd, plus<S>));
    products(1, Column<T>::of(Column<T>::load(pixels, 0, 1), even, minus<S>));
    products(2, Column<T>::of(Column<T>::load(pixels, 1, 0), odd, minus<S>));
  });

  constexpr int kRow = T::kChannels + 4;
  float* const results = reinterpret_cast<float*>(shared);
#pragma unroll
  for (int g = 0; g < T::kGroups; ++g)
#pragma unroll
    for (int m = 0; m < T::kFragments; ++m)
#pragma unroll
      for (int n = 0; n < 2; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int i = warp_row + m * 2 + half, j = lane / 4, c = (warp_group + g) * 16 + n * 8 + lane % 4 * 2;
          const float* const v = sum[g][m][n] + half * 2;
          *reinterpret_cast<float2*>(results + (i * T::kWidth + j) * kRow + c) = {v[0], v[1]};
        }
  __syncthreads();
  const TileOfOutput out{b, i0, j0, int64_t{blockIdx.y} * T::kChannels, p.height, p.width};
  store_tile<T::kThreads, T::kHeight, T::kWidth, T::kChannels>(results, p, out, S{});
}

}  // namespace

cudaError_t upsample_conv2d_backward_input_kernel(const UpsampleConv2dParams& p, cudaStream_t stream) {
  return dispatch_factor(p.dtype, p.allow_tf32, [&]<class F>() {
    const auto run = [&]<class T>() {
      return launch(backward_input_kernel<T>, grid_of<T>(p), T::kThreads, T::kSharedBytes, stream, p);
    };
    return fills_gpu<Wide<F>>(p) ? run.template operator()<Wide<F>>() : run.template operator()<Small<F>>();
  });
}

}  // namespace imagegen::cuda
