#!/usr/bin/env bash
# Runs the kernels' native tests under sanitizers. The executable is kept under the user's cache by a hash of its
# sources, flags and compiler, and build/native keeps the objects: an unchanged tree compiles nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=$PWD/.venv/bin/python
cmake=$PWD/.venv/bin/cmake
build=build/native
cache=${XDG_CACHE_HOME:-$HOME/.cache}/sglang-er/native-tests
jobs=${NATIVE_TEST_JOBS:-2}

compiler=${CXX:-c++}
isa=$(grep -om1 avx512f /proc/cpuinfo || true) # without it, its kernels are compiled without sanitizers
key=$({ find CMakeLists.txt csrc test/native scripts/native_test.sh -type f -print0 | LC_ALL=C sort -z |
    xargs -0 sha256sum; $compiler --version; printf '%s\n' "${CXXFLAGS:-}" "${LDFLAGS:-}" "$(uname -m)" "$isa"; } |
    sha256sum | cut -c1-24)

"$cmake" -S . -B "$build" -DSGLANG_ER_NATIVE_TESTS=ON -DCMAKE_BUILD_TYPE=None -DPython_EXECUTABLE="$python" >/dev/null
if [[ -x $cache/$key ]]; then
    cp "$cache/$key" "$build/native_tests"
else
    echo "native tests: compiling (minutes the first time)"
    rm -f "$build/native_tests" # one from the cache is newer than objects that it was not linked from
    "$cmake" --build "$build" --target native_tests --parallel "$jobs"
    # Of an inline function that several objects define, the linker keeps any one copy: none may come from an object
    # with instructions that the machine may lack.
    shared=$(nm -C --defined-only "$build"/CMakeFiles/native_tests.dir/csrc/cpu/*_{amx,avx}*.o | awk '$2 ~ /[Wu]/')
    if [[ -n $shared ]]; then
        printf 'native tests: give these internal linkage, or define them outside of headers:\n%s\n' "$shared" >&2
        exit 1
    fi
    mkdir -p "$cache"
    cp "$build/native_tests" "$cache/partial.$$"
    mv "$cache/partial.$$" "$cache/$key" # a reader sees a whole file or none
    # The last two are kept: they are large.
    find "$cache" -maxdepth 1 -type f -printf '%T@ %p\n' | sort -rn | tail -n +3 | cut -d' ' -f2- | xargs -r rm -f
fi
"$PWD/.venv/bin/ctest" --test-dir "$build" --output-on-failure
