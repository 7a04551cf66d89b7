"""Length files: the committed one is long-tailed and reproducible; a wrong one is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sglang_er.rollout import lengths


def test_the_committed_batches_have_a_long_tail_and_are_what_the_rule_draws():
    batches = lengths.load()
    assert len(batches) == 10 and all(len(batch) == 32 for batch in batches)
    assert all(lengths.tail_ratio(batch) >= 8 for batch in batches)
    assert batches == [lengths.draw(seed) for seed in range(10)]


def test_a_file_of_ones_own_is_read(tmp_path: Path):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"batches": [[3, 4], [5]]}))
    assert lengths.load(path) == [[3, 4], [5]]


@pytest.mark.parametrize("content", ["{", "[]", '{"batches": []}', '{"batches": [[0]]}', '{"batches": [[true]]}'])
def test_a_wrong_file_is_named_in_one_line(content: str, tmp_path: Path):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"mine\.json") as caught:
        lengths.load(path)
    assert "\n" not in str(caught.value)
