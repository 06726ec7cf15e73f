// The scheduler behind cuda_sim.h. Compiled without sanitizers, so that they watch the kernels alone.
#include "cuda_sim.h"

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <map>
#include <memory>
#include <random>
#include <span>
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
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
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
static void AnnotateIgnoreReadsBegin(const char*, int) {}
static void AnnotateIgnoreReadsEnd(const char*, int) {}
static void AnnotateIgnoreWritesBegin(const char*, int) {}
static void AnnotateIgnoreWritesEnd(const char*, int) {}
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

enum class Wait { none, block, warp, copies, cluster, done };

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

// A barrier as ThreadSanitizer sees it. Two take turns, so that the order of one does not leak into the next.
struct Order {
  char turn[2];
};

// Of arrivals and copies: the phases that ended so far, and what of this one is still to come.
struct CopyBarrier {
  int expected;  // arrivals of a phase
  int arrivals = expected;
  int phases = 0;
  int64_t bytes = 0;                          // expected and not landed; negative while copies are ahead of expect()
  std::vector<std::function<void()>> copies;  // asked for and not landed
  Order order = {};
};

struct Block;

struct Thread {
  Coordinates at;
  Block* block = nullptr;
  Context context;
  std::vector<char> stack = std::vector<char>(kStackBytes);
  void* tsan = nullptr;
  Wait wait = Wait::none;
  unsigned mask = 0;                    // the lanes a warp-level wait is for
  CopyBarrier* copy_barrier = nullptr;  // that it waits for, and the parity
  int parity = 0;
  int block_barriers = 0, warp_barriers = 0, cluster_arrivals = 0, cluster_waits = 0;
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
  char* shared;
  size_t shared_bytes;
};

// Blocks that are alive at the same time and reach each other's shared memory.
struct Cluster {
  std::span<Block> blocks;
  Order order;
  const std::function<void()>* body;
  Context scheduler;
  void* tsan;
  Thread* running;
  std::exception_ptr error;  // what a thread threw
  std::map<const void*, CopyBarrier> copy_barriers;
};

Cluster* cluster;

void to_thread(Thread& t) {
  cluster->running = &t;
  __tsan_switch_to_fiber(t.tsan, kOrdersNothing);
  switch_context(cluster->scheduler, t.context);
}

void park(Wait what, unsigned mask = 0) {
  Thread& t = *cluster->running;
  t.wait = what;
  t.mask = mask;
  __tsan_switch_to_fiber(cluster->tsan, kOrdersNothing);
  switch_context(t.context, cluster->scheduler);
}

void fiber_main() {
  try {
    (*cluster->body)();
  } catch (...) {
    cluster->error = std::current_exception();
  }
  __tsan_release(cluster);
  park(Wait::done);
}

bool ended(const CopyBarrier& barrier, int parity) {
  return barrier.phases % 2 != parity;
}

bool ended(const Block& block) {
  return std::all_of(block.threads.begin(), block.threads.end(), [](const Thread& t) { return t.wait == Wait::done; });
}

// Whether nobody is still to arrive for the barrier at which this thread waits.
bool all_arrived(const Thread& waiting) {
  for (const Block& block : cluster->blocks)
    for (const Thread& t : block.threads)
      if (t.wait != Wait::done && t.cluster_arrivals < waiting.cluster_arrivals) return false;
  return true;
}

int thread_index() {
  return static_cast<int>(cluster->running - cluster->running->block->threads.data());
}

// One turn of the warp that starts at thread `first`: its free lanes run until each parks, then the waits that are
// complete end. False if nothing moved.
bool step(Block& block, size_t first, bool reverse) {
  Thread* lanes = block.threads.data() + first;
  const int n = static_cast<int>(std::min<size_t>(32, block.threads.size() - first));
  bool moved = false;
  for (int i = 0; i < n; ++i) {
    Thread& t = lanes[reverse ? n - 1 - i : i];
    if (t.wait != Wait::none) continue;
    to_thread(t);
    if (cluster->error) std::rethrow_exception(cluster->error);
    moved = true;
  }
  for (int l = 0; l < n; ++l) {
    Thread& t = lanes[l];
    // What was asked for lands in the thread that waits for it.
    const bool copies = t.wait == Wait::copies && (!t.copy_barrier->copies.empty() || ended(*t.copy_barrier, t.parity));
    if (copies || (t.wait == Wait::cluster && all_arrived(t))) t.wait = Wait::none, moved = true;
    if (t.wait != Wait::warp) continue;
    const unsigned mask = t.mask;
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

// Whether the block's barrier, at which all its threads are, has let them go.
bool end_block_barrier(Block& block) {
  bool waits = false;
  for (const Thread& t : block.threads) {
    if (t.wait != Wait::done && t.wait != Wait::block) return false;
    waits |= t.wait == Wait::block;
  }
  for (Thread& t : block.threads)
    if (t.wait == Wait::block) t.wait = Wait::none;
  return waits;
}

[[noreturn]] void report_deadlock() {
  std::string who;
  for (const Block& block : cluster->blocks)
    for (const Thread& t : block.threads)
      if (t.wait != Wait::done && who.size() < 200)
        who.append(t.wait == Wait::block     ? " block:"
                   : t.wait == Wait::warp    ? " warp:"
                   : t.wait == Wait::cluster ? " cluster:"
                                             : " copies:")
            .append(std::to_string(t.at.thread.x));
  throw std::runtime_error("cuda_sim: deadlock, threads wait at different barriers:" + who);
}

void check_all_copies_landed() {
  for (const auto& [address, barrier] : cluster->copy_barriers)
    if (!barrier.copies.empty()) throw std::runtime_error("cuda_sim: a block ended before a copy to its shared memory");
}

// A warp runs as far ahead of the others as its barriers let it: that is what a missing barrier shows in.
void run_cluster() {
  static std::mt19937 random(1);
  const char* variable = std::getenv("SIM_ORDER");
  const std::string order = variable ? variable : "forward";
  std::vector<std::pair<Block*, size_t>> warps;
  for (Block& block : cluster->blocks)
    for (size_t first = 0; first < block.threads.size(); first += 32) warps.emplace_back(&block, first);
  if (order == "reverse") std::reverse(warps.begin(), warps.end());
  for (;;) {
    bool moved = false, done = true;
    if (order == "random") std::shuffle(warps.begin(), warps.end(), random);
    for (const auto& [block, first] : warps) {
      while (step(*block, first, order == "reverse")) {
        moved = true;
        if (order == "random" && random() % 4 == 0) break;
      }
    }
    for (Block& block : cluster->blocks) {
      done &= ended(block);
      moved |= end_block_barrier(block);
    }
    if (done) return check_all_copies_landed();
    if (!moved) report_deadlock();
  }
}

}  // namespace

const Coordinates& here() {
  return cluster->running->at;
}

int lane() {
  return thread_index() % 32;
}

void* dynamic_shared() {
  return cluster->running->block->shared;
}

void block_barrier() {
  Thread& t = *cluster->running;
  char* order = &t.block->order.turn[t.block_barriers++ % 2];
  __tsan_release(order);
  park(Wait::block);
  __tsan_acquire(order);
}

void warp_barrier(unsigned mask) {
  Thread& t = *cluster->running;
  char* order = &t.block->warp_order[thread_index() / 32].turn[t.warp_barriers++ % 2];
  __tsan_release(order);
  park(Wait::warp, mask);
  __tsan_acquire(order);
}

int cluster_rank() {
  return static_cast<int>(cluster->running->block - cluster->blocks.data());
}

void* of_block(const void* p, int rank) {
  Block& mine = *cluster->running->block;
  const size_t offset = static_cast<const char*>(p) - mine.shared;
  if (offset >= mine.shared_bytes) throw std::runtime_error("cuda_sim: not of the block's dynamic shared memory");
  Block& block = cluster->blocks[rank];
  if (ended(block)) throw std::runtime_error("cuda_sim: the shared memory of a block that has ended");
  return block.shared + offset;
}

void cluster_arrive() {
  Thread& t = *cluster->running;
  if (t.cluster_arrivals != t.cluster_waits) throw std::runtime_error("cuda_sim: arrived twice at a cluster's barrier");
  __tsan_release(&cluster->order.turn[t.cluster_arrivals++ % 2]);
}

void cluster_wait() {
  Thread& t = *cluster->running;
  if (t.cluster_arrivals == t.cluster_waits) throw std::runtime_error("cuda_sim: a cluster's barrier without arriving");
  if (!all_arrived(t)) park(Wait::cluster);
  __tsan_acquire(&cluster->order.turn[t.cluster_waits++ % 2]);
}

void exchange_begin(unsigned mask, const void* data, size_t bytes) {
  if (bytes > sizeof(Thread::shown)) throw std::runtime_error("cuda_sim: a warp exchange of more than 64 bytes");
  std::memcpy(cluster->running->shown, data, bytes);
  warp_barrier(mask);
}

const void* peer(int lane) {
  return cluster->running->block->threads[thread_index() / 32 * 32 + lane].shown;
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
  Thread& t = *cluster->running;
  __tsan_read_range(const_cast<void*>(from), bytes);
  __tsan_write_range(to, bytes);
  if (early())
    std::memcpy(to, from, bytes);
  else
    t.copies.push_back({to, from, bytes, t.groups});
}

void copy_async_commit() {
  ++cluster->running->groups;
}

void copy_async_wait(int newest_left_pending) {
  Thread& t = *cluster->running;
  const auto landed = [&](const Copy& c) { return c.group < t.groups - newest_left_pending; };
  for (const Copy& c : t.copies) {
    if (!landed(c)) continue;
    __tsan_write_range(c.to, c.bytes);
    std::memcpy(c.to, c.from, c.bytes);
  }
  t.copies.erase(std::remove_if(t.copies.begin(), t.copies.end(), landed), t.copies.end());
}

static CopyBarrier& copy_barrier(const void* address) {
  const auto found = cluster->copy_barriers.find(address);
  if (found == cluster->copy_barriers.end()) throw std::runtime_error("cuda_sim: a barrier that nobody initialised");
  return found->second;
}

// While it lives ThreadSanitizer does not look: what threads hand one another here is none of the kernel's memory, and
// where the kernel's is meant the sanitizer was told.
struct Unwatched {
  Unwatched() { AnnotateIgnoreReadsBegin(__FILE__, __LINE__), AnnotateIgnoreWritesBegin(__FILE__, __LINE__); }
  ~Unwatched() { AnnotateIgnoreWritesEnd(__FILE__, __LINE__), AnnotateIgnoreReadsEnd(__FILE__, __LINE__); }
};

static char* order_of_phase(CopyBarrier& barrier, int phase) {
  return &barrier.order.turn[phase % 2];
}

static void end_phase_if_complete(CopyBarrier& barrier) {
  if (barrier.arrivals || barrier.bytes) return;
  barrier.arrivals = barrier.expected;
  ++barrier.phases;
}

void copy_barrier_init(const void* address, int arrivals) {
  const Unwatched unwatched;
  cluster->copy_barriers[address] = {arrivals};
}

void copy_barrier_arrive(const void* address, int64_t bytes) {
  CopyBarrier& barrier = copy_barrier(address);
  if (!barrier.arrivals) throw std::runtime_error("cuda_sim: one arrival too many in a phase of a barrier");
  __tsan_release(order_of_phase(barrier, barrier.phases));
  --barrier.arrivals;
  barrier.bytes += bytes;
  end_phase_if_complete(barrier);
}

void copy_barrier_copy(const void* address, void* to, int64_t bytes, std::function<void()> copy) {
  CopyBarrier& barrier = copy_barrier(address);
  __tsan_write_range(to, bytes);  // from here on at any time
  __tsan_release(order_of_phase(barrier, barrier.phases));
  const Unwatched unwatched;
  const auto land = [&barrier, bytes, copy = std::move(copy)] {
    copy();
    barrier.bytes -= bytes;
    end_phase_if_complete(barrier);
  };
  if (early()) return land();
  barrier.copies.push_back(land);
}

void copy_barrier_wait(const void* address, int parity) {
  Thread& t = *cluster->running;
  CopyBarrier& barrier = copy_barrier(address);
  t.copy_barrier = &barrier, t.parity = parity;
  while (!ended(barrier, parity)) {
    if (barrier.copies.empty()) park(Wait::copies);
    const Unwatched unwatched;
    for (const auto& copy : std::exchange(barrier.copies, {})) copy();  // now at the latest
  }
  __tsan_acquire(order_of_phase(barrier, parity));
}

void product_async(std::function<void()> product) {
  if (early()) return product();
  cluster->running->products.push_back({std::move(product), cluster->running->product_groups});
}

void product_async_commit() {
  ++cluster->running->product_groups;
}

void product_async_wait(int newest_left_pending) {
  Thread& t = *cluster->running;
  const auto due = [&](const Product& p) { return p.group < t.product_groups - newest_left_pending; };
  const auto rest = std::find_if_not(t.products.begin(), t.products.end(), due);  // they are in the order of groups
  for (auto product = t.products.begin(); product != rest; ++product) product->run();
  t.products.erase(t.products.begin(), rest);
}

// Every thread at the kernel's beginning, the block's shared memory undefined.
static void begin(Block& block, uint3 at, dim3 dim, dim3 grid) {
  std::memset(block.shared, 0xFF, block.shared_bytes);  // NaN
  for (size_t k = 0; k < block.threads.size(); ++k) {
    Thread& t = block.threads[k];
    const unsigned n = static_cast<unsigned>(k);
    t.at = {{n % dim.x, n / dim.x % dim.y, n / dim.x / dim.y}, at, dim, grid};
    t.block = &block;
    t.wait = Wait::none;
    t.block_barriers = t.warp_barriers = t.groups = t.product_groups = t.cluster_arrivals = t.cluster_waits = 0;
    t.copies.clear();
    t.products.clear();
    t.tsan = __tsan_create_fiber(0);
    begin_context(t.context, t.stack);
  }
}

void run(dim3 grid, dim3 dim, size_t shared_bytes, const std::function<void()>& body, int blocks_of_cluster) {
  if (dim.x * dim.y * dim.z > 1024) throw std::runtime_error("cuda_sim: more than 1024 threads in a block");
  if (grid.x % blocks_of_cluster) throw std::runtime_error("cuda_sim: a grid of no whole clusters");
  static std::vector<Block> kept;  // with the fibers' stacks
  if (kept.size() < static_cast<size_t>(blocks_of_cluster)) kept.resize(blocks_of_cluster);
  static Cluster c;
  c.blocks = std::span(kept).first(blocks_of_cluster);
  c.body = &body;
  c.error = nullptr;
  c.tsan = __tsan_get_current_fiber();
  cluster = &c;
  std::vector<std::unique_ptr<void, void (*)(void*)>> shared;
  for (Block& block : c.blocks) {
    block.threads.resize(dim.x * dim.y * dim.z);
    block.warp_order.resize((block.threads.size() + 31) / 32);
    // Ends where the allocation ends, so that AddressSanitizer sees the first byte past it.
    void* p = nullptr;
    if (posix_memalign(&p, kSharedAlignment, std::max<size_t>(shared_bytes, 1))) throw std::bad_alloc();
    shared.emplace_back(p, std::free);
    block.shared = static_cast<char*>(p), block.shared_bytes = shared_bytes;
  }
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x;) {
        for (Block& block : c.blocks) begin(block, {x++, y, z}, dim, grid);
        c.copy_barriers.clear();
        run_cluster();
        __tsan_acquire(&c);
        for (Block& block : c.blocks)
          for (Thread& t : block.threads) __tsan_destroy_fiber(t.tsan);
      }
}

}  // namespace cuda_sim
