"""The executor where it meets something that it does not know: SGLang's code serves, and the log says so once."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_er.config import RolloutConfig
from sglang_er.engine.cpu.executor import NativeExecutor, install


def make_runner() -> SimpleNamespace:
    body = SimpleNamespace(forward=lambda input_ids, *_: input_ids * 2, layers=[])
    model = SimpleNamespace(model=body, modules=list)
    pool = SimpleNamespace(k_buffer=[torch.zeros(4, 1, 8)], v_buffer=[torch.zeros(4, 1, 8)])
    for name in ("set_kv_buffer", "move_kv_cache", "load_cpu_copy"):
        setattr(pool, name, lambda *_: None)
    return SimpleNamespace(model=model, token_to_kv_pool=pool, sglang_er_executor=None)


def decode(runner: SimpleNamespace) -> torch.Tensor:
    batch = SimpleNamespace(forward_mode=ForwardMode.DECODE, spec_info=None)
    return runner.model.model.forward(torch.tensor([3]), torch.tensor([0]), batch)


def test_install_leaves_an_unknown_model_alone(caplog: pytest.LogCaptureFixture):
    runner = make_runner()
    forward = runner.model.model.forward
    with caplog.at_level(logging.WARNING):
        install(runner, RolloutConfig())
    assert runner.sglang_er_executor is None and runner.model.model.forward is forward
    assert "SimpleNamespace is not a model that it knows" in caplog.text


def test_a_model_that_changed_after_loading_is_served_by_sglang(caplog: pytest.LogCaptureFixture):
    """As when something wraps the layers between loading and the first decode."""
    runner = make_runner()
    executor = NativeExecutor(runner, RolloutConfig())
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert decode(runner).item() == 6
    assert not executor.enabled and executor.forwards == {"target_wrapped": 3}
    assert caplog.text.count("run through SGLang's model code") == 1


def test_a_pool_of_another_kind_is_served_by_sglang():
    runner = make_runner()
    runner.token_to_kv_pool = SimpleNamespace()
    executor = NativeExecutor(runner, RolloutConfig())
    assert decode(runner).item() == 6 and not executor.enabled


def test_switched_off_it_counts_and_stays_out():
    runner = make_runner()
    executor = NativeExecutor(runner, RolloutConfig(executor="wrapped"))
    assert decode(runner).item() == 6 and executor.forwards == {"target_wrapped": 1}
