#include "parallel.h"

#include <pthread.h>
#include <sched.h>

#include <cstdlib>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace sglang_er::cpu {
namespace {

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// The state of a job in one word: its number, whether helpers may still enter, and how many are inside. One
// word, so that entering and closing cannot cross.
constexpr uint64_t kInsideMask = 0xFFFF;
constexpr uint64_t kOpen = 1 << 16;
constexpr uint64_t kNumber = 1 << 17;  // unit of the job number

// A pause is 20 to 140 cycles, so a helper looks for work for about 50 microseconds, the time between two
// forwards or less, before it sleeps: longer would take a core from the server's other processes.
constexpr int kPausesBeforeSleep = 1500;
constexpr int kPausesBeforeYield = 4000;

// Moves the calling thread to another core than `core`, where it may.
void leave(int core) {
  cpu_set_t allowed;
  if (core < 0 || core >= CPU_SETSIZE || sched_getaffinity(0, sizeof(allowed), &allowed) != 0) return;
  cpu_set_t others = allowed;
  CPU_CLR(core, &others);
  if (CPU_COUNT(&others) == 0 || sched_setaffinity(0, sizeof(others), &others) != 0) return;
  sched_setaffinity(0, sizeof(allowed), &allowed);
}

class Pool {
 public:
  void run(void (*body)(void*), void* context, int threads) {
    // A second caller at the same time (another thread of the process) does its work alone.
    const std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock() || !grow(threads - 1)) return body(context);
    body_ = body;
    context_ = context;
    places_ = static_cast<uint64_t>(threads - 1);
    caller_core_ = sched_getcpu();
    const uint64_t number = (state_.load(std::memory_order_relaxed) & ~(kOpen | kInsideMask)) + kNumber;
    state_.store(number | kOpen);
    if (sleepers_.load() > 0) state_.notify_all();
    body(context);
    // Nothing is left to claim. A helper that is not inside by now has nothing to do here any more.
    state_.fetch_and(~kOpen);
    for (int pauses = 0; (state_.load(std::memory_order_acquire) & kInsideMask) != 0; ++pauses) {
      if (pauses < kPausesBeforeYield) {
        pause();
      } else {
        sched_yield();
      }
    }
  }

  // In a child after fork() the helpers are gone.
  void forget_helpers() {
    helpers_ = 0;
    sleepers_.store(0);
    state_.store(0);
    new (&owner_) std::mutex;
  }

 private:
  bool grow(int helpers) {
    while (helpers_ < helpers) {
      try {
        std::thread([this] { help(); }).detach();
      } catch (const std::system_error&) {
        return helpers_ > 0;  // the process may have no more threads: fewer helpers, the same result
      }
      ++helpers_;
    }
    return true;
  }

  void help() {
    uint64_t done = 0;  // number of the last job that this helper saw the end of
    for (;;) {
      uint64_t state = await_job(done);
      done = state & ~(kOpen | kInsideMask);
      // Enter, unless the job closes or is full meanwhile.
      bool entered = false;
      while ((state & kOpen) != 0 && (state & ~(kOpen | kInsideMask)) == done &&
             (state & kInsideMask) < places_) {
        if (state_.compare_exchange_weak(state, state + 1, std::memory_order_acquire)) {
          entered = true;
          break;
        }
      }
      if (!entered) continue;
      // On the caller's core a helper only takes turns with it, and the kernel may leave it there for most of
      // a second (seen with Linux 6.18 on two cores, the other one idle).
      const int callers = caller_core_;
      const bool together = sched_getcpu() == callers;
      body_(context_);
      state_.fetch_sub(1, std::memory_order_release);
      if (together) leave(callers);
    }
  }

  // Waits for an open job other than `done`.
  uint64_t await_job(uint64_t done) {
    for (;;) {
      uint64_t state = 0;
      for (int pauses = 0; pauses < kPausesBeforeSleep; ++pauses) {
        state = state_.load(std::memory_order_acquire);
        if ((state & kOpen) != 0 && (state & ~(kOpen | kInsideMask)) != done) return state;
        pause();
      }
      sleepers_.fetch_add(1);
      state_.wait(state);
      sleepers_.fetch_sub(1);
    }
  }

  std::atomic<uint64_t> state_{0};
  std::atomic<int> sleepers_{0};
  void (*body_)(void*) = nullptr;
  void* context_ = nullptr;
  std::atomic<uint64_t> places_{0};
  std::atomic<int> caller_core_{-1};
  int helpers_ = 0;
  std::mutex owner_;
};

// Never destroyed: helpers may outlive the library's static objects.
Pool& pool() {
  static Pool& instance = []() -> Pool& {
    auto* made = new Pool;
    pthread_atfork(nullptr, nullptr, [] { pool().forget_helpers(); });
    return *made;
  }();
  return instance;
}

// A part's units [begin, end), in one word.
uint64_t pack(int64_t begin, int64_t end) {
  return static_cast<uint64_t>(end) << 32 | static_cast<uint64_t>(begin);
}
int64_t begin_of(uint64_t word) { return static_cast<int64_t>(word & 0xFFFFFFFF); }
int64_t end_of(uint64_t word) { return static_cast<int64_t>(word >> 32); }

int64_t left(const std::atomic<uint64_t>& part) {
  const uint64_t word = part.load(std::memory_order_relaxed);
  return end_of(word) - begin_of(word);
}

// Units [begin, end) from the front: an eighth of what is left, so that the last ones go one by one. Empty if
// nothing is left.
struct Run {
  int64_t begin, end;
};
Run take_front(std::atomic<uint64_t>& part) {
  uint64_t word = part.load(std::memory_order_relaxed);
  while (begin_of(word) < end_of(word)) {
    const Run run{begin_of(word), begin_of(word) + (end_of(word) - begin_of(word) + 7) / 8};
    if (part.compare_exchange_weak(word, pack(run.end, end_of(word)), std::memory_order_relaxed)) return run;
  }
  return {0, 0};
}

// Moves the back half, at least one unit, into `into`; nothing if nothing is left.
void move_back_half(std::atomic<uint64_t>& part, std::atomic<uint64_t>& into) {
  uint64_t word = part.load(std::memory_order_relaxed);
  while (begin_of(word) < end_of(word)) {
    const int64_t middle = begin_of(word) + (end_of(word) - begin_of(word)) / 2;
    if (part.compare_exchange_weak(word, pack(begin_of(word), middle), std::memory_order_relaxed)) {
      into.store(pack(middle, end_of(word)), std::memory_order_relaxed);
      return;
    }
  }
}

struct AlignedBuffer {
  void* data = nullptr;
  size_t bytes = 0;
  ~AlignedBuffer() { std::free(data); }
};

}  // namespace

void run_team(void (*body)(void*), void* context, int threads) { pool().run(body, context, threads); }

UnitParts::UnitParts(int64_t units, int threads) : threads_(threads), workers_(0) {
  for (int i = 0; i < threads; ++i) {
    parts_[i].word.store(pack(units * i / threads, units * (i + 1) / threads), std::memory_order_relaxed);
    parts_[i].taken = parts_[i].taken_end = 0;
  }
}

int UnitParts::join() {
  const int worker = workers_.fetch_add(1, std::memory_order_relaxed);
  return worker < threads_ ? worker : -1;
}

int64_t UnitParts::next(int worker) {
  Part& mine = parts_[worker];
  for (;;) {
    if (mine.taken < mine.taken_end) return mine.taken++;
    const Run run = take_front(mine.word);
    mine.taken = run.begin;
    mine.taken_end = run.end;
    if (run.begin < run.end) continue;
    int fullest = worker;
    for (int i = 0; i < threads_; ++i) {
      if (left(parts_[i].word) > left(parts_[fullest].word)) fullest = i;
    }
    if (fullest == worker) return -1;
    move_back_half(parts_[fullest].word, mine.word);
  }
}

void* scratch(size_t bytes) {
  constexpr size_t kAlignment = 64;
  thread_local AlignedBuffer buffer;
#if defined(__SANITIZE_ADDRESS__)
  // Anew and not one byte more, so that the sanitizer sees what is read past the end or after the next call.
  std::free(buffer.data);
  buffer.data = nullptr;
  if (posix_memalign(&buffer.data, kAlignment, bytes) != 0) throw std::bad_alloc();
  return buffer.data;
#endif
  if (buffer.bytes < bytes) {
    const size_t size = (bytes + bytes / 2 + kAlignment - 1) / kAlignment * kAlignment;
    void* grown = std::aligned_alloc(kAlignment, size);
    if (grown == nullptr) throw std::bad_alloc();
    std::free(buffer.data);
    buffer.data = grown;
    buffer.bytes = size;
  }
  return buffer.data;
}

}  // namespace sglang_er::cpu
