// All tests of CPU kernels on one instruction set: native_tests <name>. Exit code 77: this machine does not
// have it. Those of CUDA kernels on threads of a CPU: native_tests simt.
#include <chrono>
#include <cstdio>
#include <cstdlib>

#include "isa.h"
#include "testing.h"

namespace sglang_er::cpu {

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

std::vector<Test>& simt_tests() {
  static std::vector<Test> all;
  return all;
}

void fail(const char* file, int line, const std::string& what) {
  std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, what.c_str());
  std::abort();  // sanitizers stop at the first error too
}

int run_tests(const std::vector<Test>& chosen) {
  for (const Test& test : chosen) {
    std::printf("%s", test.name);
    std::fflush(stdout);
    const auto begin = std::chrono::steady_clock::now();
    test.run();
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
    std::printf(" %.2f s\n", took.count());
  }
  return 0;
}

}  // namespace sglang_er::cpu

int main(int argc, char** argv) {
  using namespace sglang_er::cpu;
  if (argc != 2) {
    std::fprintf(stderr, "usage: native_tests <instruction set>, or simt\n");
    return 2;
  }
  if (std::string(argv[1]) == "simt") return run_tests(simt_tests());
  bool supported = false;
  for (Isa isa : supported_isas()) supported = supported || isa_name(isa) == argv[1];
  if (!supported) return 77;
  set_isa(argv[1]);
  return run_tests(tests());
}
