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

// The state of a job in one word: its number, how many helpers may still enter, and how many are inside. One
// word, so that entering and closing cannot cross.
constexpr uint64_t kInside = 1, kInsideMask = 0xFF;
constexpr uint64_t kPlace = 1 << 8, kPlacesMask = 0xFF00;
constexpr uint64_t kNumber = 1 << 16;  // unit of the job number
static_assert(kMaxThreads - 1 <= kInsideMask);

constexpr uint64_t number_of(uint64_t state) { return state & ~(kPlacesMask | kInsideMask); }
constexpr int places_of(uint64_t state) { return static_cast<int>((state & kPlacesMask) / kPlace); }

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
  void run(TeamBody body, void* context, int threads) {
    // A second caller at the same time (another thread of the process) does its work alone.
    const std::unique_lock<std::mutex> owner(owner_, std::try_to_lock);
    if (!owner.owns_lock() || !grow(threads - 1)) return body(context, 0);
    job_.body.store(body, std::memory_order_relaxed);
    job_.context.store(context, std::memory_order_relaxed);
    job_.core.store(sched_getcpu(), std::memory_order_relaxed);
    const uint64_t number = number_of(job_.state.load(std::memory_order_relaxed)) + kNumber;
    job_.state.store(number + static_cast<uint64_t>(threads - 1) * kPlace);
    if (sleepers_.load() > 0) job_.state.notify_all();
    body(context, 0);
    // Nothing is left to claim. A helper that is not inside by now has nothing to do here any more.
    uint64_t state = job_.state.load(std::memory_order_acquire);
    if (places_of(state) > 0) state = job_.state.fetch_and(~kPlacesMask, std::memory_order_acquire);
    for (int pauses = 0; (state & kInsideMask) != 0; ++pauses) {
      if (pauses < kPausesBeforeYield) {
        pause();
      } else {
        sched_yield();
      }
      state = job_.state.load(std::memory_order_acquire);
    }
  }

  // In a child after fork() the helpers are gone.
  void forget_helpers() {
    helpers_ = 0;
    sleepers_.store(0);
    job_.state.store(0);
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
      done = number_of(state);
      // Needed next, and on their way from the caller's cache while this helper enters.
      prefetch_context(places_of(state));
      // Enter, unless the job closes or is full meanwhile.
      bool entered = false;
      while (number_of(state) == done && places_of(state) > 0 && !entered)
        entered =
            job_.state.compare_exchange_weak(state, state - kPlace + kInside, std::memory_order_acquire);
      if (!entered) continue;
      const int worker = places_of(state);
      // On the caller's core a helper only takes turns with it, and the kernel may leave it there for most of
      // a second (seen with Linux 6.18 on two cores, the other one idle).
      const int callers = job_.core.load(std::memory_order_relaxed);
      const bool together = sched_getcpu() == callers;
      const TeamBody body = job_.body.load(std::memory_order_relaxed);
      body(job_.context.load(std::memory_order_relaxed), worker);
      job_.state.fetch_sub(kInside, std::memory_order_release);
      if (together) leave(callers);
    }
  }

  void prefetch_context(int worker) {
    const auto* context = static_cast<const char*>(job_.context.load(std::memory_order_relaxed));
    __builtin_prefetch(context);
    __builtin_prefetch(context + kTeamLine * (1 + worker), 1);
  }

  // Waits for a job other than `done` that has places.
  uint64_t await_job(uint64_t done) {
    for (;;) {
      uint64_t state = 0;
      for (int pauses = 0; pauses < kPausesBeforeSleep; ++pauses) {
        state = job_.state.load(std::memory_order_acquire);
        if (places_of(state) > 0 && number_of(state) != done) return state;
        pause();
      }
      sleepers_.fetch_add(1);
      job_.state.wait(state);
      sleepers_.fetch_sub(1);
    }
  }

  // What helpers poll, and what they need of a job, in one line of cache. A line takes a fifth of a
  // microsecond from core to core; a forward has some two hundred jobs.
  struct alignas(64) Job {
    std::atomic<uint64_t> state{0};
    std::atomic<TeamBody> body{nullptr};
    std::atomic<void*> context{nullptr};
    std::atomic<int> core{-1};  // the caller's
  };

  Job job_;
  alignas(64) std::atomic<int> sleepers_{0};
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

void run_team(TeamBody body, void* context, int threads) { pool().run(body, context, threads); }

UnitParts::UnitParts(int64_t units, int threads) : threads_(threads) {
  for (int i = 0; i < threads; ++i) {
    parts_[i].word.store(pack(units * i / threads, units * (i + 1) / threads), std::memory_order_relaxed);
    parts_[i].taken = parts_[i].taken_end = 0;
  }
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
