"""Builds the CPU kernels with CMake; everything else about the package is in pyproject.toml.

The library has no Python ABI (it is loaded by path), so the extension's file name is fixed and the same in the
source tree (editable install) and in the wheel. A built library is kept under the user's cache by a hash of all that
went into it: a second checkout, or CI's second run, does not compile.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent
LIBRARY = "libsglang_er_cpu.so"


def cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sglang-er" / "native"


def find_cmake() -> str:
    """The pinned CMake of the environment if there is one, else whatever is on PATH."""
    beside_python = Path(sys.executable).parent / "cmake"
    cmake = str(beside_python) if beside_python.exists() else shutil.which("cmake")
    if cmake is None:
        raise SetupError("sglang-er: CMake not found; install it (`pip install cmake`) and try again")
    return cmake


def compiler_version() -> str:
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        raise SetupError("sglang-er: no C++ compiler found; install g++ (or set CXX) and try again")
    return subprocess.run([*compiler.split(), "--version"], check=True, capture_output=True, text=True).stdout


def source_hash() -> str:
    """Hash of what decides the library's bytes: sources, build script, compiler, flags, tvm-ffi."""
    digest = hashlib.sha256()
    folders = (ROOT / "csrc" / "cpu", ROOT / "csrc" / "include")
    files = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    for path in [ROOT / "CMakeLists.txt", *sorted(files)]:
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    try:
        tvm_ffi = metadata.version("apache-tvm-ffi")
    except metadata.PackageNotFoundError:
        raise SetupError("sglang-er: install apache-tvm-ffi first (requirements/cpu.lock has the version)") from None
    flags = [os.environ.get(name, "") for name in ("CXXFLAGS", "LDFLAGS", "CMAKE_ARGS")]
    for fact in (compiler_version(), platform.machine(), tvm_ffi, *flags):
        digest.update(fact.encode() + b"\0")
    return digest.hexdigest()[:24]


class BuildWithCMake(build_ext):
    def get_ext_filename(self, fullname: str) -> str:
        # Asked with and without the package in front.
        return str(Path(*fullname.split(".")[:-1], LIBRARY))

    def copy_extensions_to_source(self) -> None:
        # Editable install: into the source tree, where the folder may not exist in a fresh clone.
        (ROOT / "python" / "sglang_er" / "kernels" / "cpu").mkdir(parents=True, exist_ok=True)
        super().copy_extensions_to_source()

    def build_extension(self, ext: Extension) -> None:
        if not (ROOT / "CMakeLists.txt").exists():
            raise SetupError(f"sglang-er: {ROOT / 'CMakeLists.txt'} is missing: the source tree is incomplete")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        cached = cache_dir() / source_hash() / LIBRARY
        if not cached.exists():
            self._compile(cached)
        # Never written in place: a running server may have the old library mapped.
        fresh = target.with_suffix(f".{os.getpid()}")
        # With the time of now: setuptools does not put a library in the place of a newer one, and that of the sources
        # that were just checked out may have been built long ago.
        shutil.copyfile(cached, fresh)
        fresh.replace(target)

    def _compile(self, cached: Path) -> None:
        build_dir = (Path(self.build_temp) / "cmake").resolve()
        # Generators and compilers are remembered in CMakeCache.txt; a folder left by another CMake would be refused.
        shutil.rmtree(build_dir, ignore_errors=True)
        output_dir = build_dir / "out"
        output_dir.mkdir(parents=True)
        cmake = find_cmake()
        configure = [
            cmake, "-S", str(ROOT), "-B", str(build_dir), "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}", f"-DSGLANG_ER_OUTPUT_DIR={output_dir}",
            *os.environ.get("CMAKE_ARGS", "").split(),
        ]  # fmt: skip
        for step in (configure, [cmake, "--build", str(build_dir), "--parallel", str(os.cpu_count() or 1)]):
            if subprocess.run(step, check=False).returncode != 0:
                raise SetupError(f"sglang-er: this step of the native build failed: {' '.join(step)}")
        built = output_dir / LIBRARY
        if not built.exists():
            raise SetupError(f"sglang-er: the build made no {LIBRARY} in SGLANG_ER_OUTPUT_DIR ({output_dir})")
        cached.parent.mkdir(parents=True, exist_ok=True)
        partial = cached.with_suffix(f".{os.getpid()}")
        shutil.copy2(built, partial)
        partial.replace(cached)  # a reader sees a whole library or none


class ShipCudaSources(build_py):
    """A wheel has the sources of the CUDA kernels, to be compiled where they are used, and the libraries of the folder
    SGLANG_ER_SHIP_CUDA_KERNELS (`sglang-er build-kernels --out`) if there is one, for machines without nvcc."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        shipped = Path(self.build_lib, "sglang_er", "kernels", "cuda", "csrc")
        for folder in ("cuda", "include"):
            shutil.copytree(ROOT / "csrc" / folder, shipped / folder, dirs_exist_ok=True)
        shutil.rmtree(shipped.parent / "prebuilt", ignore_errors=True)  # of an earlier wheel
        if folder := os.environ.get("SGLANG_ER_SHIP_CUDA_KERNELS"):
            if not list(Path(folder).glob("*.so")):
                raise SetupError(f"sglang-er: SGLANG_ER_SHIP_CUDA_KERNELS={folder} has no library: build-kernels --out")
            ignored = shutil.ignore_patterns("*.log", "*.lock", "*.partial")
            shutil.copytree(folder, shipped.parent / "prebuilt", ignore=ignored)


class WheelForAnyPython(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("sglang_er.kernels.cpu.libsglang_er_cpu", sources=[])],
    cmdclass={"build_ext": BuildWithCMake, "build_py": ShipCudaSources, "bdist_wheel": WheelForAnyPython},
)
