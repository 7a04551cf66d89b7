"""`sglang-er serve`: SGLang's server with the plugin on and the right defaults; all of SGLang's flags pass through."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence

from sglang_er import config

# Options that this parser does not know are SGLang's.
FORWARD_UNKNOWN = True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Serve a model with exact self-speculation. Every flag of `sglang serve` is accepted as well."
    parser.add_argument(
        "--plain", action="store_true", help="no speculation, everything else the same: the fair baseline"
    )
    parser.add_argument("--model-path", "--model", required=True, help="Hugging Face checkpoint directory")
    config.add_flags(parser)


def with_threads(resolved: config.RolloutConfig, forwarded: Sequence[str]) -> config.RolloutConfig:
    """The thread count of this machine where nobody chose one; its engines and their ranks share the cores."""
    from sglang_er.rollout import cores

    if resolved.cpu_threads is not None or os.environ.get("OMP_NUM_THREADS"):
        return resolved
    # With abbreviations, as SGLang's parser takes them: `--dp` and `--tp` are such.
    parser = argparse.ArgumentParser(prog="sglang-er serve", add_help=False)
    parser.add_argument("--dp-size", "--data-parallel-size", dest="engines", default="1")
    parser.add_argument("--tp-size", "--tensor-parallel-size", dest="ranks", default="1")
    given = parser.parse_known_args(list(forwarded))[0]
    # What is no number is for SGLang to refuse.
    engines, ranks = (max(1, int(text)) if text.isdigit() else 1 for text in (given.engines, given.ranks))
    share = cores.default_threads() // (engines * ranks)
    return config.extended(resolved, "default", {"cpu_threads": max(1, share)})


def run(args: argparse.Namespace) -> int:
    resolved = config.from_flags(args)
    from sglang_er.compat import torchvision_shim
    from sglang_er.engine import host, launch

    launch.check_model_path(args.model_path)
    torchvision_shim.install()
    on_cpu = not host.accelerator_present()
    if on_cpu:
        resolved = with_threads(resolved, args.forwarded)
    os.environ.update(config.to_env(resolved))
    argv = ["--model-path", args.model_path, *args.forwarded]
    argv += launch.default_flags(argv, args.plain, on_cpu)
    launch.prepare_environment(on_cpu)
    launch.launch(argv)
    return 0
