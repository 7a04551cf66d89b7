// Linked into every library of this folder: the loader refuses one of another version of the package.
#include <tvm/ffi/function.h>

#include <cstdint>

#include "sglang_er/version.h"

namespace sglang_er::cuda {

TVM_FFI_DLL_EXPORT_TYPED_FUNC(library_version, []() -> int64_t { return kLibraryVersion; });

}  // namespace sglang_er::cuda
