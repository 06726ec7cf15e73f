// y = the sum of x's 64 rows of 40 elements, which pass through two stages as boxes of 8 rows and 64 columns: right
// where bug is 0, wrong in one way with each other number.
//   1: rows read that nobody waited for
//   2: a stage asked for again before everyone has read it
//   3: the phase before waited for
//   4: barriers waited for before they are there
#include <exception>
#include <string>

#include "common/copy_tensor.cuh"
#include "common/launch.cuh"
#include "common/scalar.cuh"

namespace {

using namespace imagegen;
using namespace imagegen::cuda;

constexpr int kRows = 8, kBoxes = 8, kBox = kRows * kBoxColumns;

__global__ void sum_kernel(const __grid_constant__ TensorMap x, float* y, int bug) {
  bf16* const stages = dynamic_shared<bf16>();
  CopyBarrier* const arrived = reinterpret_cast<CopyBarrier*>(stages + 2 * kBox);
  const int column = threadIdx.x;
  const auto ask_for = [&](int box) {
    if (threadIdx.x != 0 || box == kBoxes) return;
    arrived[box % 2].expect(kBox * 2);
    copy_tensor(stages + box % 2 * kBox, x, 0, box * kRows, 1, 2, arrived[box % 2]);
  };
  if (threadIdx.x == 0) arrived[0].init(), arrived[1].init();
  if (bug != 4) __syncthreads();
  ask_for(0);
  float sum = 0.f;
  for (int box = 0; box < kBoxes; ++box) {
    if (bug != 2 && bug != 4) __syncthreads();
    ask_for(box + 1);
    if (bug != 1) arrived[box % 2].wait((box / 2 + (bug == 3)) % 2);
    for (int r = 0; r < kRows; ++r)
      sum += to_compute(stages[box % 2 * kBox + r * kBoxColumns + (column / 8 ^ r % 8) * 8 + column % 8]);
  }
  y[column] = sum;
}

}  // namespace

// x: of shape (3, 2, 64, 40), strides in elements; of it batch 2 and head 1 are summed.
extern "C" const char* sum_of_rows(const bf16* x, int64_t batch, int64_t head, int64_t row, float* y, int bug) {
  static std::string error;
  try {
    TensorMap map;
    if (make_tensor_map(map, x, {40, 64, 2, 3}, {row * 2, head * 2, batch * 2}, kRows) != cudaSuccess)
      return "the tensor is not taken";
    launch(sum_kernel, 1, 64, 4 * kBox + 16, nullptr, map, y, bug);
    return nullptr;
  } catch (const std::exception& e) {
    return (error = e.what()).c_str();
  }
}
