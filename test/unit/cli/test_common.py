"""The cache of made models: one of a kind, never half of one."""

from __future__ import annotations

import io

import pytest

from sglang_er.cli import common
from sglang_er.models import make
from sglang_er.rollout.progress import Progress


def test_the_model_is_made_once_and_never_in_place(made):
    progress = Progress(io.StringIO())
    first = common.cached_model("tiny", "qwen3", progress)
    assert common.cached_model("tiny", "qwen3", progress) == first
    assert len(made) == 1 and made[0] != first
    assert [path.name for path in first.parent.iterdir()] == [first.name]
    assert common.cached_model("tiny", "llama", progress) != first


def test_a_model_that_cannot_be_made_leaves_nothing_behind(made, monkeypatch):
    def fails(shape, arch, out, target_alpha, progress):
        out.mkdir(parents=True)
        raise ValueError("no such size")

    monkeypatch.setattr(make, "make_model", fails)
    with pytest.raises(ValueError):
        common.cached_model("tiny", "qwen3", Progress(io.StringIO()))
    assert not list((common.cache_dir() / "models").iterdir())


def test_a_model_of_another_alpha_is_another_model(made):
    progress = Progress(io.StringIO())
    usual = common.cached_model("0.5b", "qwen3", progress)
    better = common.cached_model("0.5b", "qwen3", progress, 0.98)
    assert usual != better and "alpha0.98" in better.name


def test_a_card_is_read_where_there_is_one(tmp_path):
    assert common.card_of(tmp_path) == {}
    (tmp_path / "er_model_card.json").write_text('{"alpha": 0.5}')
    assert common.card_of(tmp_path)["alpha"] == 0.5
