"""AReaL's SGLang backend, its servers started by `sglang-er serve`. Requests, updates and pauses are AReaL's own."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import areal.engine
from areal.api.cli_args import InferenceEngineConfig, SGLangConfig
from areal.engine.sglang_remote import RemoteSGLangEngine, SGLangBackend
from areal.infra.utils.launcher import TRITON_CACHE_PATH

from sglang_er import config

_TRAINER = "areal.trainer.rl_trainer"


def serve_command(server_args: Mapping[str, Any]) -> list[str]:
    """The command of a server from what `SGLangConfig.build_args` made of an ERSGLangConfig."""
    flags = dict(server_args)
    options, plain = flags.pop("er", None) or {}, flags.pop("er_plain", False)
    extra, python = flags.pop("er_flags", None) or {}, flags.pop("er_python", None) or sys.executable
    # How values become flags is AReaL's rule; its launcher, a copy of an older SGLang's, is replaced.
    theirs = SGLangConfig.build_cmd_from_args(flags | dict(extra))
    handed = config.to_env(config.resolve(flags=options))
    ours = [(config.flag_of(name), handed.get(config.ENV_PREFIX + name.upper())) for name in options]
    return [
        *(python, "-m", "sglang_er.cli.main", "serve"),
        *(["--plain"] if plain else []),
        *(word for flag, text in ours if text for word in (flag, text)),
        *theirs[theirs.index("-m") + 2 :],
    ]


class ERSGLangBackend(SGLangBackend):
    """AReaL's backend with our launch."""

    def launch_server(self, server_args: dict[str, Any]) -> subprocess.Popen[bytes]:
        # As AReaL does: servers that start together do not compile into one cache.
        cache = Path(os.environ.get("TRITON_CACHE_PATH", TRITON_CACHE_PATH)) / uuid.uuid4().hex
        return subprocess.Popen(
            serve_command(server_args),
            env={**os.environ, "TRITON_CACHE_PATH": str(cache)},
            stdout=sys.stdout,
            stderr=sys.stdout,
        )


class ERRemoteSGLangEngine(RemoteSGLangEngine):
    """AReaL's engine with our backend. Its workers import this class by its name: install sglang-er there too."""

    def __init__(self, config: InferenceEngineConfig) -> None:
        super().__init__(config)
        self._engine.backend = ERSGLangBackend()


def use_in_trainer() -> None:
    """AReaL's trainer names its engine class itself; from now on it finds ours. Call before making the trainer."""
    areal.engine.RemoteSGLangEngine = ERRemoteSGLangEngine
    if _TRAINER in sys.modules:
        sys.modules[_TRAINER].RemoteSGLangEngine = ERRemoteSGLangEngine  # type: ignore[attr-defined]
