"""A compiler that writes what it is told, for tests of what surrounds it."""

from __future__ import annotations

from pathlib import Path

import pytest

SCRIPT = """#!/bin/sh
if [ "$1" = --version ]; then echo "Build {version}"; exit 0; fi
echo run >> {folder}/runs
{body}
while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done
sleep .2
echo "library" > "$out"
echo "ptxas info    : Compiling entry function 'plain' for 'sm_90a'"
echo "    8 bytes stack frame, 12 bytes spill stores, 4 bytes spill loads"
echo "ptxas info    : Used 40 registers, used 1 barriers, 1024 bytes smem, 400 bytes cmem[0]"
"""


class FakeCompiler:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.write()

    def write(self, body: str = "", version: str = "1.0") -> None:
        nvcc = self.folder / "bin" / "nvcc"
        nvcc.parent.mkdir(exist_ok=True)
        nvcc.write_text(SCRIPT.format(folder=self.folder, body=body, version=version))
        nvcc.chmod(0o755)

    @property
    def runs(self) -> int:
        log = self.folder / "runs"
        return len(log.read_text().splitlines()) if log.exists() else 0


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeCompiler:
    """Stands in for nvcc; the cache is empty and the test's own."""
    from sglang_er.kernels.cuda import build

    folder = tmp_path / "toolkit"
    folder.mkdir()
    monkeypatch.setenv("CUDA_HOME", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(build.PREBUILT_ENVIRONMENT, raising=False)
    monkeypatch.setattr(build, "_nvcc_version", build._nvcc_version.__wrapped__)
    return FakeCompiler(folder)
