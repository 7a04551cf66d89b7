"""The one composition root: everything SGLang is told about sglang-er, it is told here.

Two entry points name functions of this module:
- `sglang.srt.platforms` -> activate_platform: asked for in every process, very early;
- `sglang.srt.plugins` -> register: run by SGLang's load_plugins() before a server starts.
"""

from __future__ import annotations

import os
import sys
from types import ModuleType


def activate_platform() -> str | None:
    """Name of our platform class if the CPU platform is the one to use here, else None (`engine/host.py` decides)."""
    from sglang_er.engine import compat, host

    _register_early()
    if compat.installed_sglang() not in compat.SUPPORTED_SGLANG:
        return None  # a server that does not ask for us keeps its own platform
    return host.PLATFORM_CLASS if host.cpu_platform_wanted() else None


def register() -> None:
    """Register the algorithm, its hooks, the admin routes and, on our platform, the CPU replacements."""
    from sglang_er.engine import compat
    from sglang_er.engine.registration import after_import

    if compat.installed_sglang() not in compat.SUPPORTED_SGLANG:
        # A server that does not ask for us must keep working beside an installed plugin.
        after_import("sglang.srt.speculative.spec_info", _register_algorithm)
        return
    from sglang.srt.platforms import current_platform

    from sglang_er import config
    from sglang_er.engine import hooks, provenance_http, rl_compat, rl_compat_http
    from sglang_er.engine.algorithm import register_algorithm
    from sglang_er.engine.cpu.platform import CpuPlatform

    try:
        # Options from a file or defaults reach the kernels and the platform of this process through the environment.
        os.environ.update(config.to_env(config.from_env()))
        register_algorithm()
        hooks.register()
        rl_compat.register()
        rl_compat_http.register()
        provenance_http.register()
        if isinstance(current_platform, CpuPlatform):
            from sglang_er.engine.cpu import patches

            patches.register()
    except Exception as error:
        # SGLang only logs a plugin's exception and goes on without it; half a plugin must not serve.
        sys.exit(f"sglang-er could not be set up: {type(error).__name__}: {error}")
    after_import("sglang.srt.entrypoints.http_server", _add_routes)


def _register_early() -> None:
    from sglang_er.engine.registration import after_import

    after_import("sglang.srt.speculative.spec_info", _register_algorithm)


def _register_algorithm(_: ModuleType) -> None:
    from sglang_er.engine.algorithm import register_algorithm

    register_algorithm()


def _add_routes(http_server: ModuleType) -> None:
    from sglang_er.engine.http_routes import add_routes

    add_routes(http_server)
