"""Which SGLang versions this plugin was written against, checked at start-up: a private API that moved must not fail
later. What differs between them is in `versions/`, behind `adapter()`."""

from __future__ import annotations

import importlib
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_er.engine.versions.base import Adapter

# The version that is tested on every change; the others are run now and then (docs/compatibility.md).
TESTED_SGLANG = "0.5.21"
_ADAPTERS = {
    "0.5.15.post1": "v0_5_15:Sglang0515",
    "0.5.21": "v0_5_21:Sglang0521",
    "0.5.23": "v0_5_23:Sglang0523",
}
SUPPORTED_SGLANG = tuple(_ADAPTERS)


class UnsupportedSGLang(RuntimeError):
    """The installed SGLang is not one that this version of sglang-er knows."""


def installed_sglang() -> str:
    """Without what a repackaged build appends (`+...`)."""
    try:
        return version("sglang").partition("+")[0]
    except PackageNotFoundError:
        return "not installed"


def require_supported_version() -> None:
    """Raises UnsupportedSGLang with one line that names both versions."""
    found = installed_sglang()
    if found not in SUPPORTED_SGLANG:
        raise UnsupportedSGLang(
            f"sglang-er supports SGLang {', '.join(SUPPORTED_SGLANG)} but {found} is installed: "
            f"pip install sglang=={TESTED_SGLANG}, or a release of sglang-er for {found}"
        )


@lru_cache
def adapter() -> Adapter:
    """Of the installed version. Raises UnsupportedSGLang."""
    require_supported_version()
    return adapter_for(installed_sglang())


@lru_cache
def adapter_for(sglang: str) -> Adapter:
    """Of a supported version, installed or not."""
    module, _, name = _ADAPTERS[sglang].partition(":")
    chosen: type[Adapter] = getattr(importlib.import_module(f"sglang_er.engine.versions.{module}"), name)
    return chosen()


def require_private_api() -> None:
    """Raises UnsupportedSGLang naming every private name that is gone (a patched or repackaged SGLang)."""
    missing = []
    for entry in adapter().required:
        module_name, _, path = entry.partition(":")
        try:
            target: object = importlib.import_module(module_name)
            for part in path.split("."):
                target = getattr(target, part)
        except (ImportError, AttributeError):
            missing.append(entry)
    if missing:
        raise UnsupportedSGLang(
            f"sglang-er relies on private names that SGLang {installed_sglang()} lacks here: {', '.join(missing)}; "
            f"install an unmodified sglang=={installed_sglang()}"
        )
