// Version of the binary interface between the compiled libraries and python/sglang_er/kernels.
// Raise it whenever a signature or the packed layout changes; the Python loader refuses any other value.
#pragma once

namespace sglang_er {

inline constexpr int kLibraryVersion = 3;

}  // namespace sglang_er
