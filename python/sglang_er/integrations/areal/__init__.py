"""AReaL with this server: a config with our options, and a backend that starts `sglang-er serve` (docs/areal.md).

Names are imported when they are asked for; without a fitting AReaL that is an ImportError of one line.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOME = {
    "ERSGLangConfig": "config",
    "ERGRPOConfig": "config",
    "ERSGLangBackend": "backend",
    "ERRemoteSGLangEngine": "backend",
    "use_in_trainer": "backend",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from sglang_er.integrations.areal.requirement import require

    require()
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
