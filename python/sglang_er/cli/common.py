"""What several commands do: keep made models in the user's cache, and end a server when they are ended."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from sglang_er import __version__

if TYPE_CHECKING:
    from sglang_er.rollout.progress import Progress


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM ends a command as Ctrl-C does, so that no server is left behind."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_code(command: str, progress: Progress, work: Callable[[], None]) -> int:
    """0 if `work` was done; else one line and 1 if a server failed, 2 for a choice that cannot be, 130 on Ctrl-C."""
    from sglang_er.rollout.errors import RolloutError

    try:
        with terminable():
            work()
    except RolloutError as error:
        message, code = str(error), 1
    except (ValueError, OSError) as error:
        message, code = str(error), 2
    except KeyboardInterrupt:
        message, code = "interrupted", 130
    else:
        return 0
    progress.close()
    print(f"sglang-er {command}: {message}", file=sys.stderr)
    return code


def card_of(model: Path) -> dict[str, Any]:
    """The model card of a made checkpoint; empty for any other."""
    path = model / "er_model_card.json"
    card: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return card


def check_checkpoint(model: Path) -> None:
    """Raises ValueError if nothing is there: no page of a hub should be looked up for it."""
    if not (model / "config.json").is_file():
        raise ValueError(f"--model-path {model}: no checkpoint there (config.json is missing)")


def check_folder(*paths: Path | None) -> None:
    """Raises ValueError where a file cannot be written: better before the work than after it."""
    for path in paths:
        if path is not None and not path.parent.is_dir():
            raise ValueError(f"{path}: there is no folder {path.parent}")


def write_json(path: Path, content: Any) -> None:
    """A result's file."""
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def cache_dir() -> Path:
    """The user's cache of this project."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sglang-er"


def models_hash() -> str:
    """Of everything that a made model depends on, so that a newer package never serves an older model."""
    digest = hashlib.sha256()

    def add(folder: Any) -> None:
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
            if entry.is_dir() and entry.name != "__pycache__":
                add(entry)
            elif entry.name.endswith((".py", ".json", ".safetensors.xz")):
                digest.update(entry.name.encode() + entry.read_bytes())

    add(resources.files("sglang_er.models"))
    return digest.hexdigest()[:12]


def cached_model(shape: str, arch: str, progress: Progress, target_alpha: float | None = None) -> Path:
    """The checkpoint of this shape, made on first use."""
    from sglang_er.models.make import make_model

    name = f"{arch}-{shape}" + ("" if target_alpha is None else f"-alpha{target_alpha:g}")
    model = cache_dir() / "models" / f"{name}-{__version__}-{models_hash()}"
    if (model / "config.json").is_file():
        return model
    progress.note(f"making the model {name} (once): {model}")
    # Not in place: of two commands that start together, both finish, and one of the two models stays.
    unfinished = model.with_name(f"{model.name}.{os.getpid()}")
    try:
        make_model(
            shape,
            arch,
            unfinished,
            target_alpha,
            progress=lambda line: progress.update(line.replace(unfinished.name, model.name)),
        )
        with suppress(OSError):
            unfinished.rename(model)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return model
