// Runs a CUDA kernel, compiled as C++, on one thread of a CPU: the threads of a block are fibers that take
// turns where they wait for each other, in an order drawn anew for every launch; blocks run one after the
// other, in any order. What waits for something that never comes is an error, and so is a warp that does not
// all take part in what it does together.
//
// What it does not show: races within what a thread does between two waits, caches, and blocks that overlap.
#pragma once

#include <ucontext.h>

#include <array>
#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "testing.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace sglang_er::simt {

using cpu::fail;
using cpu::Random;

inline constexpr int kWarpThreads = 32;

// A copy to shared memory that a thread has begun and does not know to be done.
struct Copy {
  void* to;
  const void* from;
  int bytes, size;  // that are read, and written; zeros follow
  void land() const {
    std::memset(to, 0, static_cast<size_t>(size));
    std::memcpy(to, from, static_cast<size_t>(bytes));
  }
};

struct Thread {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  void* fake_stack = nullptr;
  bool done = false;
  const int* awaited = nullptr;  // runs on once this differs from `seen`
  int seen = 0;
  std::vector<Copy> copies;               // of the group that is open
  std::vector<std::vector<Copy>> groups;  // closed, the oldest first
};

// What a warp does together: each lane leaves where its operands and its result are.
struct Warp {
  int arrived = 0, turn = 0;
  const void* what = nullptr;  // the operation, to see that all lanes are at the same one
  std::array<void*, kWarpThreads> operands;
};

class Block {
 public:
  static constexpr size_t kStackBytes = 96 << 10;

  Block(int threads, std::function<void()> kernel, uint64_t seed)
      : kernel_(std::move(kernel)), random_(seed), eager_(random_() % 3) {
    threads_.resize(static_cast<size_t>(threads));
    warps_.resize(static_cast<size_t>((threads + kWarpThreads - 1) / kWarpThreads));
    live_ = threads;
  }

  void run() {
    current() = this;
    for (size_t i = 0; i < threads_.size(); ++i) {
      Thread& thread = threads_[i];
      thread.stack.reset(new char[kStackBytes]);
      getcontext(&thread.context);
      thread.context.uc_stack.ss_sp = thread.stack.get();
      thread.context.uc_stack.ss_size = kStackBytes;
      thread.context.uc_link = nullptr;
      makecontext(&thread.context, &Block::enter, 0);
    }
    while (live_ > 0) {
      bool moved = false;
      const size_t first = random_() % warps_.size(), far = random_() % 2;
      for (size_t i = 0; i < warps_.size(); ++i) {
        const size_t warp = (first + i) % warps_.size();
        // A warp runs until it has to wait, or takes one step at a time.
        while (step(warp)) {
          moved = true;
          if (far == 0) break;
        }
      }
      if (!moved) fail(__FILE__, __LINE__, "threads wait for each other for good");
    }
    current() = nullptr;
  }

  // -- what threads call
  // ---------------------------------------------------------------------------------------

  static Block& now() { return *current(); }

  void synchronize() {
    const int turn = barrier_;
    if (++waiting_ == live_) {
      waiting_ = 0;
      ++barrier_;
    } else {
      wait(barrier_, turn);
    }
  }

  // `operate` on all lanes' operands, once.
  template <class Operands, class Operate>
  void together(Operands& operands, const Operate& operate) {
    Warp& warp = warps_[active_ / kWarpThreads];
    static const char name = 0;  // one a pair of types
    if (warp.arrived > 0 && warp.what != &name)
      fail(__FILE__, __LINE__, "lanes of a warp are at different operations");
    warp.what = &name;
    warp.operands[active_ % kWarpThreads] = &operands;
    const int turn = warp.turn;
    if (++warp.arrived == kWarpThreads) {
      std::array<Operands*, kWarpThreads> all;
      for (int lane = 0; lane < kWarpThreads; ++lane) all[lane] = static_cast<Operands*>(warp.operands[lane]);
      operate(all);
      warp.arrived = 0;
      ++warp.turn;
    } else {
      wait(warp.turn, turn);
    }
  }

  void begin_copy(const Copy& copy) { thread().copies.push_back(copy); }
  // A group that is closed may land at any time; it has landed when a thread was told so.
  void close_copies() {
    thread().groups.push_back(std::move(thread().copies));
    thread().copies.clear();
    if (eager_ == 1 || (eager_ == 2 && random_() % 2 == 0)) land(0);
  }
  void land(size_t open) {
    std::vector<std::vector<Copy>>& groups = thread().groups;
    while (groups.size() > open) {
      for (const Copy& copy : groups.front()) copy.land();
      groups.erase(groups.begin());
    }
  }

  // True for the first thread of the launch that asks.
  static bool& previous_is_over() {
    static bool over = false;
    return over;
  }
  static std::function<void()>& previous() {
    static std::function<void()> launch;
    return launch;
  }

 private:
  static Block*& current() {
    static Block* block = nullptr;
    return block;
  }
  Thread& thread() { return threads_[active_]; }

  static void enter() {
    Block& block = now();
    block.entered();
    block.kernel_();
    Thread& thread = block.thread();
    if (!thread.copies.empty() || !thread.groups.empty()) {
      for (const std::vector<Copy>& group : thread.groups) {
        if (!group.empty()) fail(__FILE__, __LINE__, "a thread ends while its copies are under way");
      }
      if (!thread.copies.empty()) fail(__FILE__, __LINE__, "a thread ends with copies that it never closed");
    }
    thread.done = true;
    --block.live_;
    if (block.waiting_ > 0 && block.waiting_ == block.live_) {
      block.waiting_ = 0;
      ++block.barrier_;
    }
    block.leave(true);
  }

  void wait(const int& counter, int seen) {
    thread().awaited = &counter;
    thread().seen = seen;
    leave(false);
  }

  bool step(size_t warp) {
    bool moved = false;
    const size_t first = warp * kWarpThreads, last = std::min(first + kWarpThreads, threads_.size());
    for (size_t i = first; i < last; ++i) {
      Thread& thread = threads_[i];
      if (thread.done || (thread.awaited != nullptr && *thread.awaited == thread.seen)) continue;
      thread.awaited = nullptr;
      active_ = i;
      threadIdx = {static_cast<unsigned>(i), 0, 0};
      enter_thread(thread);
      moved = true;
    }
    return moved;
  }

#if defined(__SANITIZE_ADDRESS__)
  void enter_thread(Thread& thread) {
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, thread.stack.get(), kStackBytes);
    swapcontext(&scheduler_, &thread.context);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
  }
  void entered() {
    __sanitizer_finish_switch_fiber(thread().fake_stack, &scheduler_stack_, &scheduler_stack_bytes_);
  }
  void leave(bool for_good) {
    Thread& own = thread();
    __sanitizer_start_switch_fiber(for_good ? nullptr : &own.fake_stack, scheduler_stack_,
                                   scheduler_stack_bytes_);
    swapcontext(&own.context, &scheduler_);
    entered();
  }
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_stack_bytes_ = 0;
#else
  void enter_thread(Thread& thread) { swapcontext(&scheduler_, &thread.context); }
  void entered() {}
  void leave(bool) { swapcontext(&thread().context, &scheduler_); }
#endif

  std::function<void()> kernel_;
  std::mt19937_64 random_;
  uint64_t eager_;  // copies land when they are waited for, at once, or either
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  ucontext_t scheduler_;
  size_t active_ = 0;
  int live_ = 0, waiting_ = 0, barrier_ = 0;
};

// Launches `kernel(params)`. `shared` is filled with 0xFF before every block. `previous`: what the launch
// before this one does to memory, which is done when a thread has waited for it, at the latest when it is
// over.
template <class Params>
void launch(
    void (*kernel)(Params), dim3 grid, int threads, Random& random, const Params& params, uint8_t* shared,
    size_t shared_bytes, std::function<void()> previous = [] {}) {
  Block::previous_is_over() = false;
  Block::previous() = std::move(previous);
  gridDim = grid;
  blockDim = {static_cast<unsigned>(threads), 1, 1};
  std::vector<uint3> blocks;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) blocks.push_back({x, y, z});
    }
  }
  std::shuffle(blocks.begin(), blocks.end(), random);
  for (const uint3& block : blocks) {
    blockIdx = block;
    std::memset(shared, 0xFF, shared_bytes);
    Block(threads, [&] { kernel(params); }, random()).run();
  }
  if (!Block::previous_is_over()) Block::previous()();
}

}  // namespace sglang_er::simt
