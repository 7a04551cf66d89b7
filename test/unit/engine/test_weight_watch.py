"""Every writer of SGLang's weight updater raises the epoch, whether it succeeds or not; a session is open from its
begin to its end."""

from __future__ import annotations

from typing import Any

import pytest
from sglang.srt.model_executor.model_runner_components.weight_updater import WeightUpdater

from sglang_er.engine.weight_watch import CLOSER, OPENER, WRITERS, WatchedWeightUpdater


class Updater:
    """With the methods of SGLang's WeightUpdater that are watched."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.calls: list[str] = []
        self.other = "not watched"

    def __getattr__(self, name: str) -> Any:
        if name not in WRITERS | {OPENER}:
            raise AttributeError(name)

        def method(*_: object, **__: object) -> str:
            self.calls.append(name)
            if self.error is not None:
                raise self.error
            return name

        return method


def test_sglangs_updater_has_what_is_watched() -> None:
    assert all(callable(getattr(WeightUpdater, name)) for name in WRITERS | {OPENER})


@pytest.mark.parametrize("name", sorted(WRITERS))
@pytest.mark.parametrize("fails", [False, True])
def test_a_writer_raises_the_epoch_once_even_if_it_fails(name: str, fails: bool) -> None:
    changes: list[int] = []
    watched = WatchedWeightUpdater(Updater(ValueError("half written") if fails else None), lambda: changes.append(1))
    if fails:
        with pytest.raises(ValueError, match="half written"):
            getattr(watched, name)("argument", keyword=1)
    else:
        assert getattr(watched, name)("argument", keyword=1) == name
    assert changes == [1]


def test_a_session_is_open_between_begin_and_end() -> None:
    changes: list[int] = []
    watched = WatchedWeightUpdater(Updater(), lambda: changes.append(1))
    assert not watched.session_open
    getattr(watched, OPENER)()
    assert watched.session_open
    assert changes == [], "opening writes nothing"
    watched.update_weights_from_tensor()
    assert watched.session_open
    getattr(watched, CLOSER)(run_post_load=True)
    assert not watched.session_open


def test_an_end_that_fails_leaves_it_open() -> None:
    """As in SGLang, whose session ends after the runners did."""
    inner = Updater()
    watched = WatchedWeightUpdater(inner, lambda: None)
    getattr(watched, OPENER)()
    inner.error = RuntimeError("no memory")
    with pytest.raises(RuntimeError):
        getattr(watched, CLOSER)(run_post_load=True)
    assert watched.session_open


def test_what_writes_nothing_is_passed_through() -> None:
    assert WatchedWeightUpdater(Updater(), lambda: None).other == "not watched"


def test_an_updater_without_these_methods_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"begin_weight_update.*unsupported version"):
        WatchedWeightUpdater(object(), lambda: None)
