"""Compiles a library of ``specs.py`` with nvcc into the user's cache, or finds it in a folder of prebuilt ones.

A wheel may bring some. Others lie in the cache under a hash of all that decides their bytes: the source and what it
includes, flags, nvcc, tvm-ffi. Ranks that need the same one wait for the first. Beside it is a JSON file: what it was
built from, and what each kernel uses (registers, spills, shared memory).
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

from sglang_er.kernels.cpu.loader import LibraryError
from sglang_er.kernels.cuda.specs import Arch, Spec

PREBUILT_ENVIRONMENT = "SGLANG_ER_CUDA_KERNELS"
_FLAGS = (
    "-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas", "-v", "-Werror", "all-warnings",
    "-Xcompiler", "-fPIC,-Wall,-fvisibility=hidden", "-shared",
)  # fmt: skip
_EVERY_LIBRARY = "library_version.cpp"
_INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)


def sources() -> Path:
    """The folder csrc: in a wheel beside this file, else of the source tree."""
    here = Path(__file__).resolve()
    return shipped if (shipped := here.parent / "csrc").is_dir() else here.parents[4] / "csrc"


def cache_dir() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sglang-er" / "cuda"


def prebuilt_dir() -> Path | None:
    """What the environment names."""
    folder = os.environ.get(PREBUILT_ENVIRONMENT)
    return Path(folder) if folder else None


def shipped_dir() -> Path:
    """Libraries that came with the wheel (setup.py, SGLANG_ER_SHIP_CUDA_KERNELS); often there are none."""
    return Path(__file__).resolve().parent / "prebuilt"


def file_name(spec: Spec, arch: Arch) -> str:
    return f"{spec.name}.{arch.sm}.so"


def find_nvcc() -> str | None:
    """The compiler of the toolkit that the user names, of the usual one, or on PATH (maybe a script that calls it)."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for home in filter(None, homes):
        if os.access(nvcc := Path(home) / "bin" / "nvcc", os.X_OK):
            return str(nvcc)
    return shutil.which("nvcc")


@functools.cache
def _nvcc_version(nvcc: str) -> str:
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    if done.returncode:
        raise LibraryError(f"CUDA kernels: {nvcc} does not run: {_last_line(done.stderr)}")
    return done.stdout.strip().splitlines()[-1]


def files_of(spec: Spec) -> list[Path]:
    """The library's sources and, recursively, what they include of ours."""
    root = sources()
    found: dict[Path, None] = {}
    pending = [root / "cuda" / spec.source, root / "cuda" / _EVERY_LIBRARY]
    while pending:
        path = pending.pop()
        if path in found:
            continue
        if not path.is_file():
            raise LibraryError(f"CUDA kernels: {path} is missing: the installation is incomplete")
        found[path] = None
        for name in _INCLUDE.findall(path.read_text(encoding="utf-8")):
            folders = (path.parent, root / "cuda", root / "include")
            pending += [folder / name for folder in folders if (folder / name).is_file()][:1]
    return sorted(found)


def _own_flags(spec: Spec, arch: Arch) -> list[str]:
    target = f"-gencode=arch=compute_{arch.name},code={arch.sm}"
    defines = [f"-D{define}" for define in (*spec.defines, f"SGLANG_ER_SHARED_KB={arch.shared_kb}")]
    return [*_FLAGS, target, *defines, *spec.flags]


def source_key(spec: Spec, arch: Arch) -> str:
    """Hash of what this package puts into the library; a prebuilt one must have the same."""
    digest = hashlib.sha256()
    root = sources()
    for path in files_of(spec):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    for fact in (*_own_flags(spec, arch), metadata.version("apache-tvm-ffi")):
        digest.update(fact.encode() + b"\0")
    return digest.hexdigest()[:24]


def find(spec: Spec, arch: Arch) -> Path:
    """The library: of the folder of prebuilt ones if the environment names one, else of the wheel, else built if need
    be."""
    folder = prebuilt_dir()
    if folder is None:
        shipped = shipped_dir() / file_name(spec, arch)
        return shipped if record(shipped).get("source_key") == source_key(spec, arch) else build(spec, arch)
    library = folder / file_name(spec, arch)
    if not library.is_file():
        raise LibraryError(f"CUDA kernels: {PREBUILT_ENVIRONMENT}={folder} has no {library.name}")
    if record(library).get("source_key") != source_key(spec, arch):
        raise LibraryError(f"CUDA kernels: {library} was built for another version of this package or of tvm-ffi")
    return library


def record(library: Path) -> dict[str, Any]:
    """What the build wrote beside a library; empty if there is nothing."""
    try:
        return dict(json.loads(library.with_suffix(".json").read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def build(spec: Spec, arch: Arch) -> Path:
    """Compiles unless the cache has it; returns the library's path."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise LibraryError(
            "CUDA kernels: no nvcc found (CUDA_HOME, /usr/local/cuda, PATH); install the CUDA toolkit "
            f"or set {PREBUILT_ENVIRONMENT} to a folder that `sglang-er build-kernels --out` wrote"
        )
    ours = source_key(spec, arch)
    key = hashlib.sha256(f"{ours}\0{_nvcc_version(nvcc)}".encode()).hexdigest()[:24]
    library = cache_dir() / key / file_name(spec, arch)
    if library.is_file():
        return library
    library.parent.mkdir(parents=True, exist_ok=True)
    with _locked(library.with_suffix(".lock")):
        if not library.is_file():
            _compile(nvcc, spec, arch, library, ours)
    return library


def _compile(nvcc: str, spec: Spec, arch: Arch, library: Path, ours: str) -> None:
    import tvm_ffi.libinfo

    root = sources()
    includes = [root / "include", root / "cuda"]
    foreign = {tvm_ffi.libinfo.find_include_path(), tvm_ffi.libinfo.find_dlpack_include_path()}
    partial = library.with_suffix(f".{os.getpid()}")
    command = [
        nvcc, *_own_flags(spec, arch), *(f"-I{path}" for path in includes),
        *(f"-isystem={path}" for path in sorted(foreign)), str(root / "cuda" / spec.source),
        str(root / "cuda" / _EVERY_LIBRARY), f"-L{Path(tvm_ffi.libinfo.find_libtvm_ffi()).parent}", "-ltvm_ffi",
        "-o", str(partial),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    output = done.stdout + done.stderr
    log = library.with_suffix(".log")
    log.write_text(f"{' '.join(command)}\n{output}", encoding="utf-8")
    if done.returncode:
        partial.unlink(missing_ok=True)
        errors = [line for line in output.splitlines() if "error" in line or "fatal" in line]
        reason = errors[0].strip() if errors else _last_line(output)
        raise LibraryError(f"CUDA kernels: {spec.source} does not compile for {arch.sm}: {reason} (all of it: {log})")
    facts = {"spec": spec.name, "arch": arch.sm, "source_key": ours, "nvcc": _nvcc_version(nvcc)}
    facts_path = library.with_suffix(".json")
    text = json.dumps({**facts, "kernels": parse_resources(output)}, indent=1) + "\n"
    facts_path.write_text(text, encoding="utf-8")
    partial.replace(library)  # last: who sees the library sees all of it, and what is beside it


def parse_resources(output: str) -> dict[str, dict[str, int]]:
    """Registers, bytes of spills, of stack and of static shared memory by kernel, from the output of ptxas -v."""
    found: dict[str, dict[str, int]] = {}
    current: dict[str, int] = {}
    for line in output.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)'", line):
            current = found.setdefault(entry[1], {"registers": 0, "spills": 0, "stack": 0, "shared": 0})
        elif frame := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line):
            current["stack"] = int(frame[1])
            current["spills"] = int(frame[2]) + int(frame[3])
        elif used := re.search(r"Used (\d+) registers", line):
            current["registers"] = int(used[1])
            shared = re.search(r"(\d+) bytes smem", line)
            current["shared"] = int(shared[1]) if shared else 0
    return dict(sorted(zip(readable(list(found)), found.values())))


def readable(symbols: list[str]) -> list[str]:
    """``kernel<arguments>`` of mangled names, in their order; the names themselves where there is no c++filt."""
    filt = shutil.which("c++filt")
    if filt is None or not symbols:
        return symbols
    done = subprocess.run([filt, *map(_plain, symbols)], capture_output=True, text=True, check=True)
    names = [line.replace("(anonymous namespace)::", "") for line in done.stdout.splitlines()]
    return [re.sub(r"^void |sglang_er::cuda::", "", name).split("(")[0] for name in names]


def _plain(symbol: str) -> str:
    """With the usual name of an anonymous namespace: nvcc's has hashes and a process id in it."""
    length = re.search(r"(\d+)(?=_GLOBAL__N__)", symbol)
    if length is None:
        return symbol
    return f"{symbol[: length.start()]}12_GLOBAL__N_1{symbol[length.end() + int(length[1]) :]}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no output"])[-1].strip()
