// The scheduler behind cuda_sim.h.
#include "cuda_sim.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace cuda_sim {
namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kSharedAlignment = 1024;

enum class Wait { none, block, warp, done };

struct Thread {
  Coordinates at;
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  Wait wait = Wait::none;
  unsigned mask = 0;  // the lanes a warp-level wait is for
  alignas(16) unsigned char shown[64];
};

struct Block {
  std::vector<Thread> threads;
  std::vector<unsigned char> shared;
  const std::function<void()>* body;
  ucontext_t scheduler;
  Thread* running;
  std::exception_ptr error;  // what a thread threw
};

Block* block;

void to_thread(Thread& t) {
  block->running = &t;
  swapcontext(&block->scheduler, &t.context);
}

void park(Wait what, unsigned mask = 0) {
  Thread& t = *block->running;
  t.wait = what;
  t.mask = mask;
  swapcontext(&t.context, &block->scheduler);
}

void fiber_main() {
  try {
    (*block->body)();
  } catch (...) {
    block->error = std::current_exception();
  }
  park(Wait::done);
}

int thread_index() {
  return static_cast<int>(block->running - block->threads.data());
}

// One turn of the warp that starts at thread `first`: its free lanes run until each parks, then the warp-level waits
// that are complete end. False if nothing moved.
bool step(size_t first, bool reverse) {
  Thread* lanes = block->threads.data() + first;
  const int n = static_cast<int>(std::min<size_t>(32, block->threads.size() - first));
  bool moved = false;
  for (int i = 0; i < n; ++i) {
    Thread& t = lanes[reverse ? n - 1 - i : i];
    if (t.wait != Wait::none) continue;
    to_thread(t);
    if (block->error) std::rethrow_exception(block->error);
    moved = true;
  }
  for (int l = 0; l < n; ++l) {
    if (lanes[l].wait != Wait::warp) continue;
    const unsigned mask = lanes[l].mask;
    bool complete = true;
    for (int k = 0; k < n; ++k)
      if (mask >> k & 1) complete &= lanes[k].wait == Wait::warp && lanes[k].mask == mask;
    if (!complete) continue;
    for (int k = 0; k < n; ++k)
      if (mask >> k & 1) lanes[k].wait = Wait::none;
    moved = true;
  }
  return moved;
}

[[noreturn]] void report_deadlock() {
  std::string who;
  for (const Thread& t : block->threads)
    if (t.wait != Wait::done && who.size() < 200)
      who.append(t.wait == Wait::block ? " block:" : " warp:").append(std::to_string(t.at.thread.x));
  throw std::runtime_error("cuda_sim: deadlock, threads wait at different barriers:" + who);
}

// A warp runs as far ahead of the others as its barriers let it: that is what a missing barrier shows in.
void run_block() {
  static std::mt19937 random(1);
  const char* variable = std::getenv("SIM_ORDER");
  const std::string order = variable ? variable : "forward";
  std::vector<size_t> warps;
  for (size_t first = 0; first < block->threads.size(); first += 32) warps.push_back(first);
  if (order == "reverse") std::reverse(warps.begin(), warps.end());
  for (;;) {
    bool moved = false;
    if (order == "random") std::shuffle(warps.begin(), warps.end(), random);
    for (size_t first : warps) {
      while (step(first, order == "reverse")) {
        moved = true;
        if (order == "random" && random() % 4 == 0) break;
      }
    }
    bool done = true, all_there = true;
    for (const Thread& t : block->threads) {
      done &= t.wait == Wait::done;
      all_there &= t.wait == Wait::done || t.wait == Wait::block;
    }
    if (done) return;
    for (Thread& t : block->threads)
      if (all_there && t.wait == Wait::block) t.wait = Wait::none, moved = true;
    if (!moved) report_deadlock();
  }
}

}  // namespace

const Coordinates& here() {
  return block->running->at;
}

int lane() {
  return thread_index() % 32;
}

void* dynamic_shared() {
  const uintptr_t p = reinterpret_cast<uintptr_t>(block->shared.data());
  return reinterpret_cast<void*>((p + kSharedAlignment - 1) / kSharedAlignment * kSharedAlignment);
}

void block_barrier() {
  park(Wait::block);
}

void warp_barrier(unsigned mask) {
  park(Wait::warp, mask);
}

void exchange_begin(unsigned mask, const void* data, size_t bytes) {
  if (bytes > sizeof(Thread::shown)) throw std::runtime_error("cuda_sim: a warp exchange of more than 64 bytes");
  std::memcpy(block->running->shown, data, bytes);
  warp_barrier(mask);
}

const void* peer(int lane) {
  return block->threads[thread_index() / 32 * 32 + lane].shown;
}

void exchange_end(unsigned mask) {
  warp_barrier(mask);
}

void run(dim3 grid, dim3 dim, size_t shared_bytes, const std::function<void()>& body) {
  if (dim.x * dim.y * dim.z > 1024) throw std::runtime_error("cuda_sim: more than 1024 threads in a block");
  static Block b;  // keeps the fibers' stacks
  b.threads.resize(dim.x * dim.y * dim.z);
  b.body = &body;
  b.error = nullptr;
  block = &b;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    b.shared.assign(shared_bytes + kSharedAlignment, 0xFF);  // NaN: shared memory starts out undefined
    for (size_t k = 0; k < b.threads.size(); ++k) {
      Thread& t = b.threads[k];
      const unsigned n = static_cast<unsigned>(k), x = static_cast<unsigned>(i % grid.x);
      const unsigned y = static_cast<unsigned>(i / grid.x % grid.y), z = static_cast<unsigned>(i / grid.x / grid.y);
      t.at = {{n % dim.x, n / dim.x % dim.y, n / dim.x / dim.y}, {x, y, z}, dim, grid};
      t.wait = Wait::none;
      getcontext(&t.context);
      t.context.uc_stack.ss_sp = t.stack.data();
      t.context.uc_stack.ss_size = t.stack.size();
      t.context.uc_link = nullptr;
      makecontext(&t.context, fiber_main, 0);
    }
    run_block();
  }
}

}  // namespace cuda_sim
