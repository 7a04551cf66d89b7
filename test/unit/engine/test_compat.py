"""The adapter of the installed SGLang is chosen, and a version without one is refused in one line that helps."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version

import pytest

from sglang_er.config import ConfigError
from sglang_er.engine import compat, launch
from sglang_er.engine.versions.base import Adapter

DOTTED = ("row_headroom", "write_slots", "last_slot", "seeded_hash")


@pytest.fixture
def pretend(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """For a test that pretends another version is installed."""
    compat.adapter.cache_clear()
    yield monkeypatch
    compat.adapter.cache_clear()


@pytest.mark.parametrize("sglang", compat.SUPPORTED_SGLANG)
def test_every_supported_version_has_its_adapter(sglang: str) -> None:
    adapter = compat.adapter_for(sglang)
    assert isinstance(adapter, Adapter) and adapter.versions == (sglang,)
    assert all(getattr(adapter, name).startswith("sglang.") for name in DOTTED)
    assert all(name.startswith("sglang.srt.") and name.count(":") == 1 for name in adapter.required)


def test_the_installed_version_has_all_that_is_relied_on() -> None:
    assert compat.installed_sglang() == version("sglang")
    assert compat.adapter() is compat.adapter_for(version("sglang"))
    compat.require_private_api()


def test_a_repackaged_build_is_known_by_its_version(pretend: pytest.MonkeyPatch) -> None:
    pretend.setattr(compat, "version", lambda _: "0.5.15.post1+slime3")
    assert compat.adapter() is compat.adapter_for("0.5.15.post1")


@pytest.mark.parametrize("found", ["0.5.22", "0.4.0", "not installed"])
def test_another_version_is_refused_in_one_line(pretend: pytest.MonkeyPatch, found: str) -> None:
    pretend.setattr(compat, "installed_sglang", lambda: found)
    with pytest.raises(compat.UnsupportedSGLang) as refused:
        compat.adapter()
    said = str(refused.value)
    assert "\n" not in said and f"{found} is installed" in said and "pip install sglang==0.5.21" in said
    with pytest.raises(ConfigError, match="pip install"):
        launch.launch([])


def test_a_private_name_that_is_gone_is_named(pretend: pytest.MonkeyPatch) -> None:
    pretend.setattr(
        type(compat.adapter()),
        "required",
        ("sglang.srt.layers.linear:LinearBase", "sglang.srt.layers.linear:Gone.method", "sglang.srt.gone:name"),
    )
    with pytest.raises(compat.UnsupportedSGLang) as refused:
        compat.require_private_api()
    said = str(refused.value)
    assert "Gone.method" in said and "srt.gone:name" in said and "LinearBase" not in said
    assert f"install an unmodified sglang=={version('sglang')}" in said
