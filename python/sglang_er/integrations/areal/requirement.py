"""The AReaL that this package knows. A checkout that is not installed tells no version and is taken as it is."""

from __future__ import annotations

import re
from importlib import metadata, util

TESTED = "1.0.4"


class UnsupportedAReaL(ImportError):
    """There is no AReaL, or one with another backend than ours extends. The message is one line."""


def require() -> None:
    """Raises UnsupportedAReaL unless AReaL is importable and of 1.0.x, from the tested version on."""
    if util.find_spec("areal") is None:
        raise UnsupportedAReaL(f"sglang_er.integrations.areal needs AReaL {TESTED}, and there is none: install areal")
    try:
        found = metadata.version("areal")
    except metadata.PackageNotFoundError:
        return
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:3])
    tested = tuple(int(number) for number in TESTED.split("."))
    if numbers[:2] != tested[:2] or numbers < tested:
        raise UnsupportedAReaL(
            f"AReaL {found} is installed; sglang_er.integrations.areal knows {TESTED} and later 1.0 releases: install "
            f"areal=={TESTED}, or start the servers yourself (docs/areal.md)"
        )
