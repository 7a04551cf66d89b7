// What the native tests share: registration, checks, random tensors in buffers of exactly the needed size.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "dtype.h"

namespace sglang_er::cpu {

struct Test {
  const char* name;
  void (*run)();
};
// Of the CPU's kernels, once for every instruction set; and of CUDA kernels run on threads.h, once.
std::vector<Test>& tests();
std::vector<Test>& simt_tests();
int run_tests(const std::vector<Test>& chosen);
[[noreturn]] void fail(const char* file, int line, const std::string& what);

struct Registered {
  Registered(std::vector<Test>& among, const char* name, void (*run)()) { among.push_back({name, run}); }
};
#define TEST_AMONG(among, name)                                     \
  static void name();                                               \
  static const Registered name##_is_registered(among, #name, name); \
  static void name()
#define TEST(name) TEST_AMONG(tests(), name)
#define SIMT_TEST(name) TEST_AMONG(simt_tests(), name)
#define CHECK(condition) \
  if (!(condition)) ::sglang_er::cpu::fail(__FILE__, __LINE__, #condition)
// Also fails if either is NaN.
#define CHECK_NEAR(actual, expected, bound)                                            \
  if (const double a = (actual), e = (expected), b = (bound); !(std::abs(a - e) <= b)) \
  ::sglang_er::cpu::fail(                                                              \
      __FILE__, __LINE__,                                                              \
      #actual " is " + std::to_string(a) + ", expected " + std::to_string(e) + " +- " + std::to_string(b))

inline constexpr DType kDTypes[] = {DType::kBFloat16, DType::kFloat16, DType::kFloat32};
inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

// Distance between a number and its rounding to the type, relative to the number.
inline double rounding(DType type) {
  return type == DType::kBFloat16 ? 0x1p-8 : type == DType::kFloat16 ? 0x1p-10 : 0x1p-23;
}
// Half the least denormal.
inline double denormal(DType type) { return type == DType::kFloat16 ? 0x1p-25 : 1e-37; }

using Random = std::mt19937_64;
inline double uniform(Random& random) { return static_cast<double>(random() >> 11) * 0x1p-53; }
inline double normal(Random& random) {  // near enough
  double sum = -6.0;
  for (int i = 0; i < 12; ++i) sum += uniform(random);
  return sum;
}

// On the heap, not one byte more.
template <class T>
class Exact {
 public:
  explicit Exact(int64_t size, T value = {}) : size_(size), data_(new T[static_cast<size_t>(size)]) {
    for (int64_t i = 0; i < size; ++i) data_[static_cast<size_t>(i)] = value;
  }
  Exact(const std::vector<T>& values) : Exact(static_cast<int64_t>(values.size())) {
    for (size_t i = 0; i < values.size(); ++i) data_[i] = values[i];
  }
  T* data() const { return data_.get(); }
  int64_t size() const { return size_; }
  T& operator[](int64_t i) const { return data_[static_cast<size_t>(i)]; }

 private:
  int64_t size_;
  std::unique_ptr<T[]> data_;
};

// rows x cols of a type; the elements between rows are NaN, and nothing follows the last one. A gap also
// moves the first element off the alignment that the allocator gives.
class Matrix {
 public:
  Matrix(DType type, int64_t rows, int64_t cols, int64_t gap = 0)
      : type(type),
        rows(rows),
        cols(cols),
        stride(cols + gap),
        first_(gap != 0 ? 1 : 0),
        bytes_((first_ + (rows > 0 ? (rows - 1) * stride + cols : 0)) * element_bytes(type)) {
    for (int64_t i = 0; i < bytes_.size() / element_bytes(type); ++i) put(i, kNaN);
  }
  static Matrix random(Random& random, DType type, int64_t rows, int64_t cols, int64_t gap = 0) {
    Matrix made(type, rows, cols, gap);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < cols; ++c) made.set(r, c, normal(random));
    }
    return made;
  }
  void* data() const { return bytes_.data() + first_ * element_bytes(type); }
  template <class T>
  T* as() const {
    return static_cast<T*>(data());
  }
  double at(int64_t row, int64_t col) const { return get(first_ + row * stride + col); }
  void set(int64_t row, int64_t col, double value) { put(first_ + row * stride + col, value); }
  bool gaps_are_untouched() const {
    for (int64_t i = 0; i < bytes_.size() / element_bytes(type); ++i) {
      const bool inside = i >= first_ && (i - first_) % stride < cols;
      if (!inside && !std::isnan(get(i))) return false;
    }
    return true;
  }
  bool operator==(const Matrix& other) const {
    return bytes_.size() == other.bytes_.size() &&
           std::memcmp(bytes_.data(), other.bytes_.data(), static_cast<size_t>(bytes_.size())) == 0;
  }

  const DType type;
  const int64_t rows, cols, stride;

 private:
  void put(int64_t i, double value) {
    with_type(type, [&](auto* null) {
      store_float(static_cast<decltype(null)>(static_cast<void*>(bytes_.data())) + i,
                  static_cast<float>(value));
    });
  }
  double get(int64_t i) const {
    double value = 0.0;
    with_type(type, [&](auto* null) {
      value = to_float(static_cast<decltype(null)>(static_cast<void*>(bytes_.data()))[i]);
    });
    return value;
  }

  int64_t first_;
  Exact<uint8_t> bytes_;
};

}  // namespace sglang_er::cpu
