// parallel_for and scratch: many small jobs, two callers at once, helpers gone after fork().
#include <sched.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#include <thread>
#include <vector>

#include "parallel.h"
#include "testing.h"

namespace sglang_er::cpu {
namespace {

// Every unit exactly once, by a worker in range that no other thread is at the same time.
void check_job(int64_t units, int threads) {
  std::vector<std::atomic<int>> counts(units), busy(threads);
  parallel_for(units, threads, [&](int64_t unit, int worker) {
    CHECK(worker >= 0 && worker < threads);
    CHECK(busy[worker].fetch_add(1) == 0);
    counts[unit].fetch_add(1);
    busy[worker].fetch_sub(1);
  });
  for (int64_t i = 0; i < units; ++i) CHECK(counts[i].load() == 1);
}

void check_jobs(int count) {
  for (int i = 0; i < count; ++i) check_job(i % 17, 1 + i % 4);
}

TEST(many_small_jobs) { check_jobs(3000); }

TEST(jobs_after_the_helpers_slept) {
  for (int i = 0; i < 20; ++i) {
    usleep(2000);
    check_job(100, 3);
  }
}

// Helper and caller are put onto one core, then let go.
TEST(a_helper_leaves_the_callers_core) {
  cpu_set_t all;
  CHECK(sched_getaffinity(0, sizeof(all), &all) == 0);
  if (CPU_COUNT(&all) < 2) return;
  const auto self = static_cast<pid_t>(syscall(SYS_gettid));
  std::atomic<pid_t> helper{0};
  std::atomic<int> core{-1};
  const auto job = [&] {
    parallel_for(64, 2, [&](int64_t) {
      const auto thread = static_cast<pid_t>(syscall(SYS_gettid));
      if (thread != self) helper = thread, core = sched_getcpu();
      for (volatile int i = 0; i < 2000;) i = i + 1;
    });
  };
  while (helper == 0) job();
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(sched_getcpu(), &one);
  for (const pid_t thread : {self, helper.load()}) sched_setaffinity(thread, sizeof(one), &one);
  for (int i = 0; i < 50; ++i) job();
  for (const pid_t thread : {self, helper.load()}) sched_setaffinity(thread, sizeof(all), &all);
  core = -1;
  int jobs = 0;
  while ((core == -1 || core == sched_getcpu()) && jobs < 100'000) job(), ++jobs;
  CHECK(jobs < 100'000);
  cpu_set_t after;
  CHECK(sched_getaffinity(helper, sizeof(after), &after) == 0 && CPU_EQUAL(&after, &all));
}

TEST(two_callers_at_once) {
  std::thread other([] { check_jobs(1500); });
  check_jobs(1500);
  other.join();
}

// A helper takes part sooner or later.
void await_helper() {
  std::atomic<bool> came = false;
  while (!came) {
    parallel_for(2, 2, [&](int64_t, int worker) {
      if (worker == 1) came = true;
      for (int i = 0; i < 100 && !came; ++i) usleep(10);
    });
  }
}

TEST(jobs_in_a_child_after_fork) {
  check_job(50, 3);
  for (int i = 0; i < 5; ++i) {
    const pid_t child = fork();
    CHECK(child >= 0);
    if (child == 0) {
      alarm(20);  // a hang is a failure
      check_jobs(200);
      await_helper();
      _exit(0);
    }
    check_jobs(50);
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child);
    CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0);
  }
}

TEST(scratch_is_aligned_and_grows) {
  for (size_t bytes : {1, 63, 64, 65, 1000, 10, 100'000}) {
    void* memory = scratch(bytes);
    CHECK(reinterpret_cast<uintptr_t>(memory) % 64 == 0);
    std::memset(memory, 1, bytes);
  }
}

}  // namespace
}  // namespace sglang_er::cpu
