"""Commands without the models that they would make."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_er.models import make


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Path]:
    """Directories that make_model was asked to fill; nothing real is made."""
    asked: list[Path] = []

    def make_model(shape, arch, out, target_alpha, progress):
        asked.append(out)
        out.mkdir(parents=True)
        (out / "config.json").write_text("{}")

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(make, "make_model", make_model)
    return asked
