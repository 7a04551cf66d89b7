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

// More threads than this do not help one op.
inline constexpr int kMaxThreads = 128;

// Runs body(context, worker) on the calling thread, as worker 0, and, as far as they come, on up to threads -
// 1 helpers, each another number below `threads`; returns when all that began have ended. body must be
// complete with any number of threads, and must not throw. A helper fetches the first line of *context ahead
// of time, and line 1 + worker.
using TeamBody = void (*)(void* context, int worker);
inline constexpr int kTeamLine = 64;
void run_team(TeamBody body, void* context, int threads);

// 64-byte aligned memory owned by the calling thread, valid until its next call. Throws std::bad_alloc.
void* scratch(size_t bytes);

// As many of `threads` as have at least kBytesPerThread to stream: below that, waking a thread (a few
// microseconds, far more when the machine is busy) costs more than it brings.
inline constexpr int64_t kBytesPerThread = 64 << 10;
SGLANG_ER_INLINE int threads_for(int threads, int64_t bytes) {
  const int64_t useful = 1 + bytes / kBytesPerThread;
  return threads < useful ? threads : static_cast<int>(useful);
}

// Blocks of rows per unit: many units for balance, but wide enough for several streams and operand reuse.
inline constexpr int kMaxBlocksPerUnit = 4;
SGLANG_ER_INLINE int64_t blocks_per_unit(int64_t blocks, int threads) {
  int64_t per_unit = kMaxBlocksPerUnit;
  while (per_unit > 1 && blocks < 4 * per_unit * threads) per_unit /= 2;
  return per_unit;
}

// The units of one parallel_for: every thread begins with an equal part. Defined in parallel.cpp: this file
// is compiled once for every instruction set, and of a function that several objects define inline the linker
// keeps any one, perhaps the one with instructions that the machine lacks.
class UnitParts {
 public:
  UnitParts(int64_t units, int threads);

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
};

template <class Fn>
void call_unit(const Fn& fn, int64_t unit, int worker) {
  if constexpr (std::is_invocable_v<const Fn&, int64_t, int>) {
    fn(unit, worker);
  } else {
    fn(unit);
  }
}

// Calls fn(unit) for every unit in [0, units), units below 2^32, on up to `threads` threads. Every thread has
// a run of neighbouring units, and whoever is done takes over half of what the slowest has left: one that is
// held up by something else on the machine, or that never comes, does less. fn must not throw. fn(unit,
// worker) also learns which of the threads calls it, a number in [0, threads).
template <class Fn>
void parallel_for(int64_t units, int threads, const Fn& fn) {
  if (threads > units) threads = static_cast<int>(units);
  if (threads > kMaxThreads) threads = kMaxThreads;
  if (threads <= 1) {
    for (int64_t unit = 0; unit < units; ++unit) call_unit(fn, unit, 0);
    return;
  }
  struct Shared {
    alignas(kTeamLine) Fn fn;  // by value: one line less to fetch
    alignas(kTeamLine) UnitParts parts;
  } shared{fn, {units, threads}};
  const auto body = [](void* context, int worker) {
    auto& work = *static_cast<Shared*>(context);
    for (int64_t unit = work.parts.next(worker); unit >= 0; unit = work.parts.next(worker))
      call_unit(work.fn, unit, worker);
  };
  run_team(body, &shared, threads);
}

}  // namespace sglang_er::cpu
