// Threads and scratch memory for the CPU kernels.
//
// The threads are our own and belong to the process. A team of OpenMP waits until every member has come, so
// on a busy machine each of the hundreds of regions of a forward waits for a thread that the kernel has not
// scheduled (measured: 5 times slower with two threads than with one). Here the caller starts at once,
// helpers join if they are there in time, and only those that really took work are waited for.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "sglang_er/macros.h"

namespace sglang_er::cpu {

// Runs body(context) on the calling thread and, as far as they come, on up to threads - 1 helpers; returns
// when all that began have ended. body must be complete with any number of threads, and must not throw.
void run_team(void (*body)(void*), void* context, int threads);

// 64-byte aligned memory owned by the calling thread, valid until its next call. Throws std::bad_alloc.
void* scratch(size_t bytes);

// As many of `threads` as have at least kBytesPerThread to stream: below that, waking a thread (a few
// microseconds, far more when the machine is busy) costs more than it brings.
inline constexpr int64_t kBytesPerThread = 64 << 10;
SGLANG_ER_INLINE int threads_for(int threads, int64_t bytes) {
  const int64_t useful = 1 + bytes / kBytesPerThread;
  return threads < useful ? threads : static_cast<int>(useful);
}

// Units [begin, end) that one thread still has to do, in one word. The owner takes from the front: its units
// are neighbours, whose prefetches run from one into the next. Others take from the back.
class UnitRange {
 public:
  void set(int64_t begin, int64_t end) { word_.store(pack(begin, end), std::memory_order_relaxed); }

  int64_t left() const {
    const uint64_t word = word_.load(std::memory_order_relaxed);
    return end_of(word) - begin_of(word);
  }

  // The first unit, or -1 if none is left.
  int64_t take_front() {
    uint64_t word = word_.load(std::memory_order_relaxed);
    while (begin_of(word) < end_of(word)) {
      const uint64_t rest = pack(begin_of(word) + 1, end_of(word));
      if (word_.compare_exchange_weak(word, rest, std::memory_order_relaxed)) return begin_of(word);
    }
    return -1;
  }

  // Moves the back half, at least one unit, into `into`. False if there was nothing to take.
  bool give_back_half(UnitRange& into) {
    uint64_t word = word_.load(std::memory_order_relaxed);
    while (begin_of(word) < end_of(word)) {
      const int64_t middle = begin_of(word) + (end_of(word) - begin_of(word)) / 2;
      if (word_.compare_exchange_weak(word, pack(begin_of(word), middle), std::memory_order_relaxed)) {
        into.set(middle, end_of(word));
        return true;
      }
    }
    return false;
  }

 private:
  static uint64_t pack(int64_t begin, int64_t end) {
    return static_cast<uint64_t>(end) << 32 | static_cast<uint64_t>(begin);
  }
  static int64_t begin_of(uint64_t word) { return static_cast<int64_t>(word & 0xFFFFFFFF); }
  static int64_t end_of(uint64_t word) { return static_cast<int64_t>(word >> 32); }

  alignas(64) std::atomic<uint64_t> word_{0};
};

// More threads than this do not help one op.
inline constexpr int kMaxThreads = 128;

// The units of one parallel_for: every thread begins with an equal part.
class UnitParts {
 public:
  UnitParts(int64_t units, int threads) : threads_(threads) {
    for (int i = 0; i < threads; ++i) parts_[i].set(units * i / threads, units * (i + 1) / threads);
  }

  // A number for the thread that asks, -1 once every number is given away: who leaves is not replaced.
  int join() {
    const int worker = workers_.fetch_add(1, std::memory_order_relaxed);
    return worker < threads_ ? worker : -1;
  }

  // The next unit of `worker`: of its own part, else of the part with most left. -1: nothing is left.
  int64_t next(int worker) {
    for (;;) {
      const int64_t unit = parts_[worker].take_front();
      if (unit >= 0) return unit;
      int fullest = worker;
      for (int i = 0; i < threads_; ++i) {
        if (parts_[i].left() > parts_[fullest].left()) fullest = i;
      }
      if (fullest == worker) return -1;
      parts_[fullest].give_back_half(parts_[worker]);
    }
  }

 private:
  UnitRange parts_[kMaxThreads];
  int threads_;
  alignas(64) std::atomic<int> workers_{0};
};

// Calls fn(unit) for every unit in [0, units), units below 2^32, on up to `threads` threads. Every thread has
// a run of neighbouring units, and whoever is done takes over half of what the slowest has left: one that is
// held up by something else on the machine, or that never comes, does less. fn must not throw. fn(unit,
// worker) also learns which of the threads calls it, a number in [0, threads).
template <class Fn>
void parallel_for(int64_t units, int threads, const Fn& fn) {
  const auto run = [](const Fn& fn, int64_t unit, int worker) {
    if constexpr (std::is_invocable_v<const Fn&, int64_t, int>) {
      fn(unit, worker);
    } else {
      fn(unit);
    }
  };
  if (threads > units) threads = static_cast<int>(units);
  if (threads > kMaxThreads) threads = kMaxThreads;
  if (threads <= 1) {
    for (int64_t unit = 0; unit < units; ++unit) run(fn, unit, 0);
    return;
  }
  struct Shared {
    const Fn& fn;
    decltype(run) call;
    UnitParts parts;
  } shared{fn, run, {units, threads}};
  const auto body = [](void* context) {
    auto& work = *static_cast<Shared*>(context);
    const int worker = work.parts.join();
    if (worker < 0) return;
    for (int64_t unit = work.parts.next(worker); unit >= 0; unit = work.parts.next(worker))
      work.call(work.fn, unit, worker);
  };
  run_team(body, &shared, threads);
}

}  // namespace sglang_er::cpu
