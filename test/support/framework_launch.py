"""Starts SGLang the way RL frameworks do: ServerArgs built and resolved here, without loading any plugin, and a
spawned process that runs SGLang's own launch function. Nothing of sglang-er is called, only installed."""

from __future__ import annotations

import multiprocessing
import sys

from sglang_er.compat import torchvision_shim

# Only because the machine may have a CPU torch beside a CUDA torchvision; a framework's environment has a matching one.
torchvision_shim.install()

from sglang.srt.entrypoints.http_server import launch_server  # noqa: E402
from sglang.srt.server_args import prepare_server_args  # noqa: E402


def main() -> None:
    server_args = prepare_server_args(sys.argv[1:])
    server_args.resolve_once()
    process = multiprocessing.get_context("spawn").Process(target=launch_server, args=(server_args,))
    process.start()
    process.join()
    sys.exit(process.exitcode or 0)


if __name__ == "__main__":
    main()
