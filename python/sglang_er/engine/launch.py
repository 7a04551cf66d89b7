"""Starts SGLang's own server with the plugin on: what `sglang serve` does, with our defaults and one-line errors."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path

from sglang_er.config import ConfigError
from sglang_er.engine import compat, host

ALGORITHM_FLAGS = ("--speculative-algorithm", "EFFICIENT_ROLLOUT")


def default_flags(argv: Sequence[str], plain: bool, on_cpu: bool) -> list[str]:
    """Flags that `serve` adds; whatever the user gave wins. `plain` serves without speculation, else the same."""
    flags: list[str] = []
    if plain:
        if _given(argv, "--speculative-algorithm"):
            raise ConfigError("--plain and --speculative-algorithm exclude each other: drop one of them")
    elif not _given(argv, "--speculative-algorithm"):
        flags += ALGORITHM_FLAGS
    if on_cpu:
        if not _given(argv, "--device"):
            flags += ["--device", "cpu"]
        # An idle scheduler would spin on one of the few cores.
        if not _given(argv, "--sleep-on-idle"):
            flags += ["--sleep-on-idle"]
    return flags


def _given(argv: Sequence[str], flag: str) -> bool:
    return any(arg == flag or arg.startswith(flag + "=") for arg in argv)


def check_model_path(model_path: str) -> None:
    """A local path that is not there should not be looked up on a hub first."""
    looks_local = model_path.startswith((".", "/", "~")) or model_path.count("/") > 1
    if looks_local and not (Path(model_path).expanduser() / "config.json").is_file():
        raise ConfigError(f"--model-path {model_path}: no checkpoint there (config.json is missing)")


def check_port(address: str, port: int) -> None:
    """Raises ConfigError if the port is taken: SGLang would only notice after loading the weights."""
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError as error:
            raise ConfigError(
                f"port {port} on {address} cannot be used ({error.strerror}): choose another --port"
            ) from None


def prepare_environment(on_cpu: bool) -> None:
    """Process-wide settings that SGLang's spawned processes inherit."""
    if on_cpu:
        os.environ.setdefault("SGLANG_PLATFORM", host.PLATFORM_NAME)
        host.spin_briefly()


def launch(argv: Sequence[str]) -> None:
    """Run the server in this process until it ends. Raises ConfigError for what can be told before loading."""
    try:
        compat.require_supported_version()
    except compat.UnsupportedSGLang as error:
        raise ConfigError(str(error)) from None
    # Not before: of another version these may be gone.
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    server_args = prepare_server_args(list(argv))
    check_port(server_args.host, server_args.port)
    try:
        compat.adapter().resolve(server_args)
    except (ValueError, AssertionError, NotImplementedError, OSError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise ConfigError(lines[0]) from error
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
