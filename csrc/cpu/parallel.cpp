#include "parallel.h"

#include <dlfcn.h>

#include <cstdlib>
#include <new>
#include <stdexcept>

namespace sglang_er::cpu {
namespace {

// libgomp's entry for "#pragma omp parallel"; LLVM's and Intel's runtimes export it too.
using GompParallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);

GompParallel find_team_entry() {
  void* library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (library == nullptr) library = dlopen("libgomp.so.1", RTLD_LAZY);
  void* entry = library == nullptr ? nullptr : dlsym(library, "GOMP_parallel");
  if (entry == nullptr)
    throw std::runtime_error("no OpenMP runtime found: neither PyTorch's nor libgomp.so.1");
  return reinterpret_cast<GompParallel>(entry);
}

struct AlignedBuffer {
  void* data = nullptr;
  size_t bytes = 0;
  ~AlignedBuffer() { std::free(data); }
};

}  // namespace

void run_team(void (*body)(void*), void* context, int threads) {
  static const GompParallel parallel = find_team_entry();
  parallel(body, context, static_cast<unsigned>(threads), 0);
}

void* scratch(size_t bytes) {
  constexpr size_t kAlignment = 64;
  thread_local AlignedBuffer buffer;
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
