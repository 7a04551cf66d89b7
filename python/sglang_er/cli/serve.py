"""`sglang-er serve`: SGLang's server with the plugin on and the right defaults; all of SGLang's flags pass through."""

from __future__ import annotations

import argparse
import os

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


def run(args: argparse.Namespace) -> int:
    resolved = config.from_flags(args)
    from sglang_er.compat import torchvision_shim
    from sglang_er.engine import host, launch

    launch.check_model_path(args.model_path)
    torchvision_shim.install()
    os.environ.update(config.to_env(resolved))
    on_cpu = not host.accelerator_present()
    argv = ["--model-path", args.model_path, *args.forwarded]
    argv += launch.default_flags(argv, args.plain, on_cpu)
    launch.prepare_environment(on_cpu)
    launch.launch(argv)
    return 0
