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

// More threads than this do not help one op.
inline constexpr int kMaxThreads = 128;

// The units of one parallel_for: every thread begins with an equal part. Defined in parallel.cpp: this file
// is compiled once for every instruction set, and of a function that several objects define inline the linker
// keeps any one, perhaps the one with instructions that the machine lacks.
class UnitParts {
 public:
  UnitParts(int64_t units, int threads);

  // A number for the thread that asks, -1 once every number is given away: who leaves is not replaced.
  int join();

  // The next unit of `worker`: of its own part, else of the part with most left. -1: nothing is left.
  int64_t next(int worker);

 private:
  // Units [begin, end) that one thread still has to do, in one word. The owner takes from the front: its
  // units are neighbours, whose prefetches run from one into the next. Others take from the back. What the
  // owner has taken, [taken, taken_end), is its own: an atomic operation waits for every load and store
  // before it, and one for each unit cost 6 % of a forward.
  struct alignas(64) Part {
    std::atomic<uint64_t> word;
    int64_t taken, taken_end;
  };

  Part parts_[kMaxThreads];
  int threads_;
  alignas(64) std::atomic<int> workers_;
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
