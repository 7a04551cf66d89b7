"""`sglang-er <command> ...`: finds the command's module and runs it.

A command is a module of this package with `add_arguments(parser)` and `run(args) -> int`. It is imported only when it
is asked for, so that `--help` answers at once. A module with `FORWARD_UNKNOWN = True` gets the options it does not
know as `args.forwarded` (SGLang's own flags, for `serve`); anywhere else they are an error.
"""

from __future__ import annotations

import multiprocessing

# Not parent_process(): it is still None while a spawned process imports the main script; its name is set before.
if multiprocessing.current_process().name != "MainProcess":
    # SGLang spawns its processes, and a spawned process imports the main script before anything else: the only moment
    # at which a child can be prepared. The parent does this in the commands that start a server; torch takes seconds.
    from sglang_er.compat import torchvision_shim

    torchvision_shim.install()

import argparse
import importlib
import sys
from collections.abc import Sequence

from sglang_er import __version__

COMMANDS = {
    "demo": "show rollouts with and without speculation in a real server",
    "serve": "start an SGLang server that decodes by exact self-speculation",
    "bench": "measure rollouts or kernels; table, JSON, picture",
    "calibrate": "measure what steps cost on a running server, and keep it in a file",
    "simulate": "replay rollouts over known step costs, for several policies",
    "conformance": "check what RL trainers rely on, against a running server",
    "plot": "draw where speculation gains, or a simulated rollout over time",
    "doctor": "show what this machine and installation are, and what is wrong with them",
    "build-kernels": "compile the CUDA kernels, into the cache or a folder to ship",
    "kernel-table": "from GPU records, which kernel computes at which sizes",
    "make-model": "write a Hugging Face checkpoint of a chosen shape, without downloads",
}


def _top_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sglang-er", description="Faster RL rollouts in an unmodified SGLang server.")
    parser.add_argument("--version", action="version", version=f"sglang-er {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="command", required=True)
    for name, summary in COMMANDS.items():
        commands.add_parser(name, help=summary, add_help=False)
    return parser


def _run_command(name: str, argv: Sequence[str]) -> int:
    module = importlib.import_module(f"sglang_er.cli.{name.replace('-', '_')}")
    # No abbreviations: a shortened SGLang flag must reach SGLang, not be taken for one of ours.
    parser = argparse.ArgumentParser(prog=f"sglang-er {name}", description=COMMANDS[name], allow_abbrev=False)
    module.add_arguments(parser)
    if getattr(module, "FORWARD_UNKNOWN", False):
        args, args_forwarded = parser.parse_known_args(argv)
        args.forwarded = args_forwarded
    else:
        args = parser.parse_args(argv)
    return int(module.run(args))


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in COMMANDS:
        _top_parser().parse_args(arguments or ["--help"])  # prints help, the version or the error, and exits
    from sglang_er.config import ConfigError

    try:
        return _run_command(arguments[0], arguments[1:])
    except ConfigError as error:
        for line in str(error).splitlines():
            print(f"sglang-er: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
