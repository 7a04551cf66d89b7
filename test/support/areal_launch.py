"""Starts SGLang as AReaL does, `python -m sglang.launch_server` with flags: sglang-er is installed, never called."""

from __future__ import annotations

import runpy

from sglang_er.compat import torchvision_shim

# At module level, so that spawned processes, which import this file first, have it too: the machine may have a CPU
# torch beside a CUDA torchvision; a framework's environment has a matching one.
torchvision_shim.install()

if __name__ == "__main__":
    runpy.run_module("sglang.launch_server", run_name="__main__")
