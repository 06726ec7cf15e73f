// The scheduler behind cuda_sim.h. Compiled without sanitizers, so that they watch the kernels alone.
#include "cuda_sim.h"

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__x86_64__) && !defined(SIM_WATCHED)
#define SIM_OWN_SWITCH
#else
#include <ucontext.h>
#endif

#ifdef SIM_TSAN  // ThreadSanitizer is told which fiber runs, what a barrier orders and what a copy touches
extern "C" {
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void* __tsan_get_current_fiber();
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void __tsan_read_range(void*, unsigned long);
void __tsan_write_range(void*, unsigned long);
}
#else
static void* __tsan_create_fiber(unsigned) {
  return nullptr;
}
static void __tsan_destroy_fiber(void*) {}
static void* __tsan_get_current_fiber() {
  return nullptr;
}
static void __tsan_switch_to_fiber(void*, unsigned) {}
static void __tsan_acquire(void*) {}
static void __tsan_release(void*) {}
static void __tsan_read_range(void*, unsigned long) {}
static void __tsan_write_range(void*, unsigned long) {}
#endif

namespace cuda_sim {
namespace {

constexpr size_t kStackBytes = 256 << 10;
constexpr size_t kSharedAlignment = 1024;
constexpr unsigned kOrdersNothing = 1;  // a switch of fibers: only barriers order memory

void fiber_main();

#ifdef SIM_OWN_SWITCH
// swapcontext makes a system call for the signal mask, which takes most of a test's time; nobody changes it here.
using Context = void*;  // the stack pointer of a fiber that waits, its saved registers on its stack
extern "C" __attribute__((visibility("hidden"))) void cuda_sim_switch(Context* from, Context to);
asm(R"(
cuda_sim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
void switch_context(Context& from, Context& to) {
  cuda_sim_switch(&from, to);
}
void begin_context(Context& context, std::vector<char>& stack) {
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(stack.data() + stack.size()) & ~uintptr_t{15});
  *--top = nullptr;  // where fiber_main, which never returns, would find its caller
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context = top;
}
#else  // sanitizers follow this one
using Context = ucontext_t;
void switch_context(Context& from, Context& to) {
  swapcontext(&from, &to);
}
void begin_context(Context& context, std::vector<char>& stack) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack.data();
  context.uc_stack.ss_size = stack.size();
  context.uc_link = nullptr;
  makecontext(&context, fiber_main, 0);
}
#endif

enum class Wait { none, block, warp, copies, done };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  int group;
};

struct Product {
  std::function<void()> run;
  int group;
};

// Of copies: the phases that ended so far, and what of this one is still to come.
struct CopyBarrier {
  int phases = 0;
  bool arrived = false;
  int64_t bytes = 0;                          // expected and not landed; negative while copies are ahead of expect()
  std::vector<std::function<void()>> copies;  // asked for and not landed
};

// A barrier as ThreadSanitizer sees it. Two take turns, so that the order of one does not leak into the next.
struct Order {
  char turn[2];
};

struct Thread {
  Coordinates at;
  Context context;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  void* tsan = nullptr;
  Wait wait = Wait::none;
  unsigned mask = 0;                    // the lanes a warp-level wait is for
  CopyBarrier* copy_barrier = nullptr;  // that it waits for, and the parity
  int parity = 0;
  int block_barriers = 0, warp_barriers = 0;
  alignas(16) unsigned char shown[64];
  std::vector<Copy> copies;       // issued and not landed
  int groups = 0;                 // of copies, ended so far
  std::vector<Product> products;  // issued and not run
  int product_groups = 0;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Order> warp_order;
  Order order;
  void* shared;
  const std::function<void()>* body;
  Context scheduler;
  void* tsan;
  Thread* running;
  std::exception_ptr error;  // what a thread threw
  std::map<const void*, CopyBarrier> copy_barriers;
};

Block* block;

void to_thread(Thread& t) {
  block->running = &t;
  __tsan_switch_to_fiber(t.tsan, kOrdersNothing);
  switch_context(block->scheduler, t.context);
}

void park(Wait what, unsigned mask = 0) {
  Thread& t = *block->running;
  t.wait = what;
  t.mask = mask;
  __tsan_switch_to_fiber(block->tsan, kOrdersNothing);
  switch_context(t.context, block->scheduler);
}

void fiber_main() {
  try {
    (*block->body)();
  } catch (...) {
    block->error = std::current_exception();
  }
  __tsan_release(block);
  park(Wait::done);
}

// Whether the phase of this parity has ended; what was asked for lands now at the latest.
bool ended(CopyBarrier& barrier, int parity) {
  if (barrier.phases % 2 != parity) return true;
  for (const auto& copy : std::exchange(barrier.copies, {})) copy();
  return barrier.phases % 2 != parity;
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
    if (lanes[l].wait == Wait::copies && ended(*lanes[l].copy_barrier, lanes[l].parity))
      lanes[l].wait = Wait::none, moved = true;
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
      who.append(t.wait == Wait::block  ? " block:"
                 : t.wait == Wait::warp ? " warp:"
                                        : " copies:")
          .append(std::to_string(t.at.thread.x));
  throw std::runtime_error("cuda_sim: deadlock, threads wait at different barriers:" + who);
}

void check_all_copies_landed() {
  for (const auto& [address, barrier] : block->copy_barriers)
    if (!barrier.copies.empty()) throw std::runtime_error("cuda_sim: the block ended before a copy it asked for");
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
    if (done) return check_all_copies_landed();
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
  return block->shared;
}

void block_barrier() {
  char* order = &block->order.turn[block->running->block_barriers++ % 2];
  __tsan_release(order);
  park(Wait::block);
  __tsan_acquire(order);
}

void warp_barrier(unsigned mask) {
  char* order = &block->warp_order[thread_index() / 32].turn[block->running->warp_barriers++ % 2];
  __tsan_release(order);
  park(Wait::warp, mask);
  __tsan_acquire(order);
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

static bool early() {
  const char* variable = std::getenv("SIM_ASYNC");
  return variable && std::string(variable) == "early";
}

void copy_async(void* to, const void* from, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(to) % bytes || reinterpret_cast<uintptr_t>(from) % bytes)
    throw std::runtime_error("cuda_sim: an asynchronous copy of an address not at a multiple of its size");
  Thread& t = *block->running;
  __tsan_read_range(const_cast<void*>(from), bytes);
  __tsan_write_range(to, bytes);
  if (early())
    std::memcpy(to, from, bytes);
  else
    t.copies.push_back({to, from, bytes, t.groups});
}

void copy_async_commit() {
  ++block->running->groups;
}

void copy_async_wait(int newest_left_pending) {
  Thread& t = *block->running;
  const auto landed = [&](const Copy& c) { return c.group < t.groups - newest_left_pending; };
  for (const Copy& c : t.copies) {
    if (!landed(c)) continue;
    __tsan_write_range(c.to, c.bytes);
    std::memcpy(c.to, c.from, c.bytes);
  }
  t.copies.erase(std::remove_if(t.copies.begin(), t.copies.end(), landed), t.copies.end());
}

static CopyBarrier& copy_barrier(const void* address) {
  const auto found = block->copy_barriers.find(address);
  if (found == block->copy_barriers.end()) throw std::runtime_error("cuda_sim: a barrier that nobody initialised");
  return found->second;
}

static void end_phase_if_complete(CopyBarrier& barrier) {
  if (!barrier.arrived || barrier.bytes) return;
  barrier.arrived = false;
  ++barrier.phases;
}

void copy_barrier_init(const void* address) {
  block->copy_barriers[address] = {};
}

void copy_barrier_expect(const void* address, int64_t bytes) {
  CopyBarrier& barrier = copy_barrier(address);
  if (barrier.arrived) throw std::runtime_error("cuda_sim: a second arrival in a phase of a barrier");
  barrier.arrived = true;
  barrier.bytes += bytes;
  end_phase_if_complete(barrier);
}

void copy_barrier_copy(const void* address, int64_t bytes, std::function<void()> copy) {
  CopyBarrier& barrier = copy_barrier(address);
  const auto land = [&barrier, bytes, copy = std::move(copy)] {
    copy();
    barrier.bytes -= bytes;
    end_phase_if_complete(barrier);
  };
  if (early()) return land();
  barrier.copies.push_back(land);
}

void copy_barrier_wait(const void* address, int parity) {
  Thread& t = *block->running;
  t.copy_barrier = &copy_barrier(address), t.parity = parity;
  while (!ended(*t.copy_barrier, parity)) park(Wait::copies);
}

void product_async(std::function<void()> product) {
  if (early()) return product();
  block->running->products.push_back({std::move(product), block->running->product_groups});
}

void product_async_commit() {
  ++block->running->product_groups;
}

void product_async_wait(int newest_left_pending) {
  Thread& t = *block->running;
  const auto due = [&](const Product& p) { return p.group < t.product_groups - newest_left_pending; };
  const auto rest = std::find_if_not(t.products.begin(), t.products.end(), due);  // they are in the order of groups
  for (auto product = t.products.begin(); product != rest; ++product) product->run();
  t.products.erase(t.products.begin(), rest);
}

void run(dim3 grid, dim3 dim, size_t shared_bytes, const std::function<void()>& body) {
  if (dim.x * dim.y * dim.z > 1024) throw std::runtime_error("cuda_sim: more than 1024 threads in a block");
  static Block b;  // keeps the fibers' stacks
  b.threads.resize(dim.x * dim.y * dim.z);
  b.warp_order.resize((b.threads.size() + 31) / 32);
  b.body = &body;
  b.error = nullptr;
  b.tsan = __tsan_get_current_fiber();
  block = &b;
  // Ends where the allocation ends, so that AddressSanitizer sees the first byte past it.
  if (posix_memalign(&b.shared, kSharedAlignment, std::max<size_t>(shared_bytes, 1))) throw std::bad_alloc();
  const std::unique_ptr<void, void (*)(void*)> shared(b.shared, std::free);
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks; ++i) {
    std::memset(b.shared, 0xFF, shared_bytes);  // NaN: shared memory starts out undefined
    for (size_t k = 0; k < b.threads.size(); ++k) {
      Thread& t = b.threads[k];
      const unsigned n = static_cast<unsigned>(k), x = static_cast<unsigned>(i % grid.x);
      const unsigned y = static_cast<unsigned>(i / grid.x % grid.y), z = static_cast<unsigned>(i / grid.x / grid.y);
      t.at = {{n % dim.x, n / dim.x % dim.y, n / dim.x / dim.y}, {x, y, z}, dim, grid};
      t.wait = Wait::none;
      t.block_barriers = t.warp_barriers = t.groups = t.product_groups = 0;
      t.copies.clear();
      t.products.clear();
      t.tsan = __tsan_create_fiber(0);
      begin_context(t.context, t.stack);
    }
    b.copy_barriers.clear();
    run_block();
    __tsan_acquire(&b);
    for (Thread& t : b.threads) __tsan_destroy_fiber(t.tsan);
  }
}

}  // namespace cuda_sim
