// y of each of four blocks = its number plus one times the sum of x's 32 rows of 64 elements. The two blocks of a
// cluster bring four rows at a time through two stages, each half of them into the shared memory of both: right where
// bug is 0, wrong in one way with each other number.
//   1: a stage asked for again before the other block has read it
//   2: the same, where only one of the other block's two warps said that it has
//   3: no barrier of the cluster at the end: a block ends while the other still arrives at its barriers
//   4: no barrier of the cluster at the beginning: barriers of the other block that are not there yet
//   5: a block that ends at once while the other copies to it
//   6: a warp that never says that it has read
#include <exception>
#include <string>

#include "common/cluster.cuh"
#include "common/launch.cuh"

namespace {

using namespace imagegen::cuda;

constexpr int kColumns = 64, kRows = 4, kChunks = 8, kHalf = kRows / 2 * kColumns;

__global__ void sum_kernel(const float* x, float* y, int bug) {
  float* const stages = dynamic_shared<float>();
  CopyBarrier* const arrived = reinterpret_cast<CopyBarrier*>(stages + 4 * kHalf);
  CopyBarrier* const read = arrived + 2;
  const int rank = cluster_rank(), column = threadIdx.x;
  const auto load = [&](int chunk) {
    if (threadIdx.x != 0 || chunk == kChunks) return;
    const int s = chunk % 2;
    if (chunk >= 2 && bug != 1) read[s].wait((chunk / 2 - 1) % 2);
    arrived[s].expect(2 * kHalf * sizeof(float));
    copy_to_cluster(stages + (2 * s + rank) * kHalf, x + (2 * chunk + rank) * kHalf, kHalf * sizeof(float), arrived[s],
                    3);
  };
  if (threadIdx.x == 0)
    for (int s = 0; s < 2; ++s) arrived[s].init(), read[s].init(bug == 2 ? 1 : 2);
  if (bug != 4) cluster_arrive(), cluster_wait();
  if (bug == 5 && rank == 1) return;

  load(0);
  float sum = 0.f;
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    __syncthreads();
    load(chunk + 1);
    arrived[chunk % 2].wait(chunk / 2 % 2);
    for (int r = 0; r < kRows; ++r) sum += stages[chunk % 2 * 2 * kHalf + r * kColumns + column];
    __syncwarp();
    if (threadIdx.x == 0 || (threadIdx.x == 32 && bug != 2 && bug != 6)) read[chunk % 2].arrive_at(rank ^ 1);
  }
  y[blockIdx.x * kColumns + column] = (blockIdx.x + 1) * sum;
  if (bug != 3) cluster_arrive(), cluster_wait();
}

}  // namespace

extern "C" const char* sums_of_rows(const float* x, float* y, int bug) {
  static std::string error;
  try {
    launch_clusters(2, sum_kernel, 4, kColumns, 4 * kHalf * sizeof(float) + 4 * sizeof(CopyBarrier), nullptr, x, y,
                    bug);
    return nullptr;
  } catch (const std::exception& e) {
    return (error = e.what()).c_str();
  }
}
