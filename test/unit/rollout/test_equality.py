"""Where two greedy outputs part, and whether rounding explains it."""

from __future__ import annotations

import pytest

from sglang_er.rollout.client import Response
from sglang_er.rollout.equality import Difference, first_difference


def response(ids: list[int], second: dict[int, float] | None = None) -> Response:
    top = [{token: -0.5, **(second or {})} for token in ids]
    return Response("", len(ids), "stop", ids, [-0.5] * len(ids), top)


def test_equal_outputs_have_no_difference():
    assert first_difference(response([1, 2, 3]), response([1, 2, 3])) is None


def test_the_gap_is_what_the_plain_pass_thought_of_the_other_token():
    difference = first_difference(response([1, 2, 3], {9: -0.625}), response([1, 9, 4]))
    assert difference == Difference(1, pytest.approx(0.125))
    assert difference.explained


def test_a_token_that_was_never_likely_is_not_explained():
    difference = first_difference(response([1, 2, 3]), response([1, 9, 3]))
    assert difference == Difference(1, None)
    assert not difference.explained


def test_an_output_that_ends_early_is_not_explained():
    assert first_difference(response([1, 2, 3]), response([1, 2])) == Difference(2, None)
