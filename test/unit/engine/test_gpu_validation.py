"""What a server on a GPU is refused at start-up, in one line, before it decodes wrongly or ends while it records."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.utils.torch_memory_saver_adapter import TorchMemorySaverAdapter

from sglang_er.config import ConfigError, RolloutConfig
from sglang_er.engine import algorithm
from sglang_er.engine.drafter import WrappedDrafter
from sglang_er.engine.saved_memory import SavedMemory


def validate(options: dict[str, Any] | None = None, **flags: Any) -> None:
    server_args = SimpleNamespace(**{"device": "cuda", "attention_backend": "triton", **flags})
    algorithm._validate_gpu(server_args, RolloutConfig(**(options or {})))


@pytest.mark.parametrize("backend", [None, "trtllm_mha", "fa4"])
def test_a_backend_that_we_do_not_verify_through_is_refused(backend: str | None):
    """SGLang's own choice, too: none was seen correct on a GPU, so that one has to be asked for."""
    with pytest.raises(ConfigError, match="--attention-backend triton, fa3 or flashinfer"):
        validate(disable_cuda_graph=True, attention_backend=backend)


def test_a_phase_with_another_backend_is_refused():
    with pytest.raises(ConfigError, match="--attention-backend triton, fa3 or flashinfer"):
        validate(disable_cuda_graph=True, prefill_attention_backend="trtllm_mha")


@pytest.mark.parametrize(
    "flags",
    [
        {"attention_backend": "fa3"},
        {"attention_backend": "flashinfer"},
        {"attention_backend": None, "prefill_attention_backend": "fa3", "decode_attention_backend": "flashinfer"},
    ],
    ids=str,
)
def test_what_is_supported_is_taken(flags: dict[str, Any]):
    validate(disable_cuda_graph=True, **flags)


def test_graphs_that_nobody_has_seen_are_asked_for():
    with pytest.raises(ConfigError, match="--disable-cuda-graph, or --er-draft-graphs on"):
        validate()
    validate(disable_cuda_graph=True)
    validate({"draft_graphs": "on"})


def test_draft_passes_of_several_ranks_are_not_recorded():
    with pytest.raises(ConfigError, match="--er-draft-graphs off"):
        validate({"draft_graphs": "on"}, tp_size=2)
    validate({"draft_graphs": "off"}, tp_size=2)


@pytest.mark.parametrize(
    ("flags", "refused"),
    [
        ({}, True),
        ({"disable_prefill_cuda_graph": True}, False),
        ({"cuda_graph_backend_prefill": "full"}, False),
        ({"enable_memory_saver": False}, False),
        ({"disable_cuda_graph": True}, False),
    ],
    ids=str,
)
def test_sglangs_own_prefill_graphs_know_no_memory_saver(
    flags: dict[str, Any], refused: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("SGLANG_MEMORY_SAVER_CUDA_GRAPH", "true")
    with pytest.raises(ConfigError, match="--disable-prefill-cuda-graph") if refused else nullcontext():
        validate({"draft_graphs": "on"}, **{"enable_memory_saver": True, **flags})


def test_a_cpu_is_asked_nothing():
    validate(device="cpu", attention_backend=None)


def test_graphs_need_an_attention_that_can_be_recorded():
    """Plain torch looks at lengths on the host; without a GPU nothing else is chosen by itself."""
    saver = TorchMemorySaverAdapter.create(enable=False)
    runner = SimpleNamespace(device="cuda", dtype=torch.bfloat16, memory_saver_adapter=saver)
    with pytest.raises(ConfigError, match="--er-kernels cuda,triton,reference"):
        WrappedDrafter(runner, SimpleNamespace(layers=[]), RolloutConfig(draft_graphs="on"), SavedMemory(runner))
