"""The section `ingredients`: a model is trained once, what measures it runs once, and its rows become cells."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "scripts"))

import train_tiny
from gpu import ingredients
from gpu.sections import Context, Options, Skip

from sglang_er.cli.common import card_of
from sglang_er.models import tiny
from sglang_er.rollout.prompts import knows_the_task

# Counts its calls beside itself, writes the rows that it was told, and fails where there are none.
PRETENDED = """
import sys
from pathlib import Path
folder = Path(__file__).parent
with (folder / "calls").open("a") as calls:
    calls.write(" ".join(sys.argv[1:]) + chr(10))
rows = folder / "rows.json"
if not rows.exists():
    sys.exit("the server ended with 1")
Path(sys.argv[sys.argv.index("--json") + 1]).write_text(rows.read_text())
"""


@pytest.fixture
def context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Context:
    """Dry, with a cache of its own and a pretended script that measures."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(ingredients, "SCRIPTS", tmp_path)
    (tmp_path / "bench_ingredients.py").write_text(PRETENDED)
    ingredients._measured.cache_clear()
    return Context(Options(tmp_path, dry_run=True))


def pretend_trained(context: Context) -> None:
    folder = ingredients.trained(context.options)
    folder.mkdir(parents=True)
    (folder / "config.json").touch()


def rows(**of: float) -> str:
    made = [
        {"lm_head": head, "activations": "exact", "kv": kv, "alpha": alpha, "error": 0.01, "accept_length": 3.0}
        for key, alpha in of.items()
        for head, kv in [key.split("_")]
    ]
    return json.dumps({"rows": made})


def test_every_ingredient_is_a_cell() -> None:
    names = [cell.name for cell in ingredients.cells(Options(Path()))]
    assert names[:2] == ["train", "weights"] and len(set(names)) == len(names)
    assert {"weights + lm_head", "weights + int4 KV", "weights + int8 KV", "weights + lm_head + int4 KV"} < set(names)


def test_a_row_becomes_a_cell_and_all_come_from_one_run(context: Context, tmp_path: Path) -> None:
    pretend_trained(context)
    (tmp_path / "rows.json").write_text(rows(exact_off=0.91, int4_int8=0.85))
    assert ingredients.measure(False, "off", context)["alpha"] == 0.91
    assert ingredients.measure(True, "int8", context)["shown"] == "alpha 0.8500 ± 0.0200, accept length 3.000"
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert "--activations exact" in call and "cuda" not in call


def test_a_run_that_fails_is_not_repeated(context: Context, tmp_path: Path) -> None:
    pretend_trained(context)
    for shadow in ("off", "int4"):
        with pytest.raises(RuntimeError, match="the server ended with 1"):
            ingredients.measure(False, shadow, context)
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


def test_without_a_model_nothing_is_measured(context: Context) -> None:
    with pytest.raises(Skip, match="no model was trained"):
        ingredients.measure(False, "off", context)
    with pytest.raises(Skip, match="servers of its own"):
        ingredients.measure(False, "off", replace(context, options=replace(context.options, url="http://localhost:1")))


def test_a_model_is_trained_once_and_knows_the_task(context: Context, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ingredients, "SCRIPTS", Path(train_tiny.__file__).parent)
    monkeypatch.setattr(ingredients, "DRY_TRAINING", ("--hidden", "64", "--layers", "1", "--steps", "2"))
    made = ingredients.train(context)
    folder = ingredients.trained(context.options)
    assert made["trained"] and 0 < made["megabytes"] < 1 and len(made["steps"]) == 2
    assert json.loads((folder / "config.json").read_text())["hidden_size"] == 64
    assert knows_the_task(card_of(folder))
    assert not ingredients.train(context)["trained"]


def test_the_trained_model_is_small_enough_to_keep() -> None:
    options = dict(zip(ingredients.TRAINING, ingredients.TRAINING[1:]))
    hidden, layers = int(options["--hidden"]), int(options["--layers"])
    shape = replace(tiny.TINY, hidden=hidden, layers=layers, query_heads=hidden // 64, mlp=hidden)
    norms = (2 * layers + 1) * hidden + layers * 2 * shape.head_dim
    assert 10_000_000 < 2 * (shape.parameters() + norms) < train_tiny.MOST_BYTES
