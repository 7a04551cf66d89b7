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

// Calls fn(unit) for every unit in [0, units) on up to `threads` threads. A thread takes half its even share
// of what is left at a time: neighbouring units stay on one thread, whose prefetches run from one into the
// next, and a thread that is held up by something else on the machine takes fewer. fn must not throw.
// fn(unit, worker) also learns which of the threads calls it, a number in [0, threads): a thread leaves only
// when no unit is left, so nobody who comes in its place gets to call fn.
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
  if (threads <= 1) {
    for (int64_t unit = 0; unit < units; ++unit) run(fn, unit, 0);
    return;
  }
  struct Shared {
    const Fn& fn;
    int64_t units;
    int64_t shares;
    decltype(run) call;
    std::atomic<int64_t> next;
    std::atomic<int> workers;
  } shared{fn, units, 2 * int64_t{threads}, run, 0, 0};
  const auto body = [](void* context) {
    auto& work = *static_cast<Shared*>(context);
    const int worker = work.workers.fetch_add(1, std::memory_order_relaxed);
    int64_t begin = work.next.load(std::memory_order_relaxed);
    while (begin < work.units) {
      const int64_t share = (work.units - begin) / work.shares;
      const int64_t end = begin + (share > 1 ? share : 1);
      if (!work.next.compare_exchange_weak(begin, end, std::memory_order_relaxed)) continue;
      for (int64_t unit = begin; unit < end; ++unit) work.call(work.fn, unit, worker);
      begin = work.next.load(std::memory_order_relaxed);
    }
  };
  run_team(body, &shared, threads);
}

}  // namespace sglang_er::cpu
