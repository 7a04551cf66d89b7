"""Which buffer lies under which tag of the memory saver, and that nothing is read of what came back without contents.

Method: a saver that records what is allocated in its regions and returns garbage (support/memory_saver.py). Symptoms of
a defect: a buffer that stays on the GPU, scratch memory in a region, a twin that drafts from garbage, a shadow whose
flags say that garbage is a copy.
"""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.utils.torch_memory_saver_adapter import TorchMemorySaverAdapter
from support.memory_saver import RecordingSaver

from sglang_er.config import RolloutConfig
from sglang_er.engine import compat, saved_memory
from sglang_er.engine.controller import Controller
from sglang_er.engine.draft_loop import MOST_DRAFTS
from sglang_er.engine.drafter import WrappedDrafter
from sglang_er.engine.dual_precision import install_twin
from sglang_er.engine.graphs import CudaGraphs
from sglang_er.engine.saved_memory import CUDA_GRAPH, KV_CACHE, WEIGHTS, SavedMemory
from sglang_er.engine.target_graphs import TargetGraphs
from sglang_er.engine.weight_sync import WeightSync
from sglang_er.engine.weight_watch import OPENER, WRITERS
from sglang_er.twin.twin import StaleTwin

SLOTS, HEADS, DIM, LAYERS, VOCABULARY, CONTEXT = 300, 2, 64, 2, 50, 100
WHOLE = {"draft_graphs": "eager", "kv_shadow": "int4", "kv_shadow_from": 0}


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = ReplicatedLinear(96, 160, bias=False, params_dtype=torch.float32)
        torch.nn.init.normal_(self.linear.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)[0]


def make_runner(saver: TorchMemorySaverAdapter) -> SimpleNamespace:
    keys, values = ([torch.randn(SLOTS, HEADS, DIM) for _ in range(LAYERS)] for _ in range(2))
    pool = SimpleNamespace(k_buffer=keys, v_buffer=values, dtype=torch.float32, start_layer=0)
    for name in ("set_kv_buffer", "move_kv_cache", "load_cpu_copy"):
        setattr(pool, name, lambda *_: None)
    return SimpleNamespace(
        model=Model(),
        memory_saver_adapter=saver,
        device="cpu",
        dtype=torch.float32,
        tp_rank=0,
        dp_rank=None,
        server_args=SimpleNamespace(enable_hierarchical_cache=False, enable_metrics=False),
        model_config=SimpleNamespace(vocab_size=VOCABULARY, context_len=CONTEXT),
        token_to_kv_pool=pool,
        req_to_token_pool=SimpleNamespace(req_to_token=torch.zeros(4, CONTEXT, dtype=torch.int32)),
        weight_updater=SimpleNamespace(**{name: lambda: None for name in WRITERS | {OPENER}}),
    )


def make_worker(saver: TorchMemorySaverAdapter, **options: Any) -> SimpleNamespace:
    """The parts of the engine's worker that release and resume concern; the model is too small to draft with."""
    runner, config = make_runner(saver), RolloutConfig(group_size=32, **{**WHOLE, **options})
    worker = SimpleNamespace(runner=runner, memory=SavedMemory(runner), target_graphs=TargetGraphs(runner))
    worker.twin = install_twin(runner.model, 32, False, partial(worker.memory.region, WEIGHTS))
    worker.drafter = WrappedDrafter(runner, worker.twin, config, worker.memory)
    controller = Controller(config, measured_on={})
    worker.sync = WeightSync(runner, worker.twin, config, controller, worker.memory)
    return worker


@pytest.fixture(autouse=True)
def no_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of requests and tokens: no server is published here."""
    monkeypatch.setattr(compat.adapter(), "request_limits", lambda: (None, None))


@pytest.fixture
def saver() -> RecordingSaver:
    return RecordingSaver()


def cycle(worker: SimpleNamespace, saver: RecordingSaver, *tags: str) -> None:
    saved_memory.released(worker, tags)
    for tag in tags:
        saver.pause(tag)
        saver.resume(tag)
    saved_memory.resumed(worker, tags)


def draft(worker: SimpleNamespace, x: torch.Tensor) -> torch.Tensor:
    worker.twin.about_to_draft()
    with torch.no_grad(), worker.twin.draft_pass():
        return worker.runner.model(x)


def test_the_packed_weights_are_all_that_lies_under_weights(saver: RecordingSaver) -> None:
    worker = make_worker(saver)
    layer = worker.twin.layers[0].packed
    assert {layer.packed.data_ptr(), layer.scales_zeros.data_ptr()} == set(saver.allocated[WEIGHTS])
    assert saver.nbytes(WEIGHTS) == layer.nbytes == saved_memory.describe(worker)["nbytes"][WEIGHTS]
    assert not saver.backups


def test_a_twin_whose_weights_came_back_is_remade_before_it_drafts(saver: RecordingSaver) -> None:
    """In the same buffers; in between, a draft pass is an error."""
    worker, x = make_worker(saver, check_epochs=True), torch.randn(3, 96)
    fresh, addresses = draft(worker, x), set(saver.allocated[WEIGHTS])
    saved_memory.released(worker, [WEIGHTS])
    saver.pause(WEIGHTS)
    assert not worker.sync.ready() and worker.sync.describe()["weights_released"]
    with pytest.raises(StaleTwin):
        draft(worker, x)
    with pytest.raises(RuntimeError, match="the weights are released"):
        worker.sync.requantize_now()
    saver.resume(WEIGHTS)
    epoch = worker.twin.weight_epoch
    saved_memory.resumed(worker, [WEIGHTS])
    assert worker.twin.weight_epoch > epoch
    with pytest.raises(StaleTwin):
        draft(worker, x)
    with torch.no_grad(), worker.twin.draft_pass():
        assert not torch.equal(worker.runner.model(x), fresh), "nothing was lost: nothing was tested"
    assert worker.sync.ready()
    assert torch.equal(draft(worker, x), fresh)
    layer = worker.twin.layers[0].packed
    assert {layer.packed.data_ptr(), layer.scales_zeros.data_ptr()} == addresses


@pytest.mark.parametrize("tag", [WEIGHTS, KV_CACHE, CUDA_GRAPH])
def test_nothing_is_drafted_while_anything_is_away(saver: RecordingSaver, tag: str) -> None:
    worker = make_worker(saver)
    assert worker.sync.ready()
    saved_memory.released(worker, [WEIGHTS, KV_CACHE, CUDA_GRAPH])
    for back in {WEIGHTS, KV_CACHE, CUDA_GRAPH} - {tag}:
        saved_memory.resumed(worker, [back])
    assert saved_memory.describe(worker)["released"] == [tag]
    assert not worker.sync.ready()
    saved_memory.resumed(worker, [tag])
    assert worker.sync.ready()


def test_the_shadow_and_its_flags_are_all_that_lies_under_kv_cache(saver: RecordingSaver) -> None:
    worker = make_worker(saver)
    assert worker.drafter._whole() is not None
    shadow = worker.drafter.shadow()
    assert shadow.valid.data_ptr() in saver.allocated[KV_CACHE]
    assert saver.nbytes(KV_CACHE) == shadow.nbytes == saved_memory.describe(worker)["nbytes"][KV_CACHE]


def test_what_came_back_of_the_shadow_is_not_read(saver: RecordingSaver) -> None:
    """Nor is anything of it while it is away, not even to be counted."""
    worker = make_worker(saver)
    assert worker.drafter._whole() is not None
    slots, shadow = torch.tensor([5, 6, 7]), worker.drafter.shadow()
    worker.drafter.written(slots)
    assert set(shadow.valid.nonzero().flatten().tolist()) >= {5, 6, 7}
    saved_memory.released(worker, [KV_CACHE])
    saver.pause(KV_CACHE)
    before = [tensor.clone() for tensor in (shadow.valid, shadow.layers[0].keys)]
    worker.drafter.written(slots)
    assert all(torch.equal(*pair) for pair in zip(before, (shadow.valid, shadow.layers[0].keys)))
    assert worker.drafter.describe_shadow()["valid_slots"] is None
    saver.resume(KV_CACHE)
    assert shadow.valid.any(), "nothing was lost: nothing was tested"
    saved_memory.resumed(worker, [KV_CACHE])
    assert worker.drafter.describe_shadow()["valid_slots"] == 0
    worker.drafter.written(slots)
    assert set(shadow.valid.nonzero().flatten().tolist()) >= {5, 6, 7}


def test_weights_alone_leave_the_shadow_as_it_is(saver: RecordingSaver) -> None:
    worker = make_worker(saver)
    worker.drafter._whole()
    worker.drafter.written(torch.tensor([5, 6, 7]))
    epoch = worker.twin.weight_epoch
    cycle(worker, saver, KV_CACHE)
    assert worker.twin.weight_epoch == epoch
    worker.drafter.written(torch.tensor([5, 6, 7]))
    valid = worker.drafter.shadow().valid.clone()
    cycle(worker, saver, WEIGHTS)
    assert worker.twin.stale and torch.equal(worker.drafter.shadow().valid, valid)


def test_what_drafts_are_drawn_from_lies_under_cuda_graph(saver: RecordingSaver) -> None:
    """512 rows of the vocabulary, allocated when verification asks for them; the small buffers of a pass stay."""
    worker = make_worker(saver)
    loop = worker.drafter._whole()
    assert saver.nbytes(CUDA_GRAPH) == 0
    key = SimpleNamespace(rule="rejection", bucket=2, gamma=3)
    probs = loop._probs_for(key)
    assert probs.shape == (3, 2, VOCABULARY) and probs.data_ptr() in saver.allocated[CUDA_GRAPH]
    nbytes = saved_memory.describe(worker)["nbytes"][CUDA_GRAPH]
    assert saver.nbytes(CUDA_GRAPH) == nbytes == 4 * MOST_DRAFTS * VOCABULARY


@pytest.mark.parametrize("held", [False, True])
def test_graphs_are_recorded_where_sglangs_are(
    saver: RecordingSaver, monkeypatch: pytest.MonkeyPatch, held: bool
) -> None:
    """With SGLANG_MEMORY_SAVER_CUDA_GRAPH under the tag, with a backup as SGLang's have; else by torch alone."""
    monkeypatch.setenv("SGLANG_MEMORY_SAVER_CUDA_GRAPH", str(held).lower())
    asked: list[Any] = []
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **kwargs: asked.append((args, kwargs)))
    memory = SavedMemory(make_runner(saver))
    memory_context: Any = memory.recording("graph", "pool")
    if held:
        with memory_context:
            pass
        assert saver.recordings == [
            {
                "cuda_graph": "graph",
                "pool": "pool",
                "capture_error_mode": "thread_local",
                "tag": CUDA_GRAPH,
                "enable_cpu_backup": True,
            }
        ]
        assert not asked
    else:
        assert asked == [(("graph",), {"pool": "pool", "capture_error_mode": "thread_local"})]
        assert not saver.recordings


def test_no_graph_is_replayed_while_its_memory_is_away(saver: RecordingSaver, monkeypatch: pytest.MonkeyPatch) -> None:
    """The KV shadow is written by a graph even where nothing drafts: then by the calls that the graph holds."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    memory, calls = SavedMemory(make_runner(saver)), []
    graphs = CudaGraphs(1 << 20, memory)
    graphs._graphs["key"] = SimpleNamespace(replay=lambda: calls.append("replayed"))
    for away in ((), (CUDA_GRAPH,), (KV_CACHE,)):
        memory.away = frozenset(away)
        graphs.run("key", lambda: calls.append("called"))
    assert calls == ["replayed", "called", "replayed"]
    assert (graphs.counts["replayed"], graphs.counts["called"]) == (2, 1)


def test_without_a_saver_all_is_the_same_but_that_it_stays() -> None:
    """SGLang's own adapter that does nothing."""
    worker = make_worker(TorchMemorySaverAdapter.create(enable=False))
    worker.drafter._whole()
    state = saved_memory.describe(worker)
    assert not state["saver"] and state["nbytes"][WEIGHTS] > 0 and state["nbytes"][KV_CACHE] > 0
    saved_memory.released(worker, [WEIGHTS, KV_CACHE])
    assert not worker.sync.ready()
    saved_memory.resumed(worker, [WEIGHTS, KV_CACHE])
    assert worker.twin.stale and worker.sync.ready() and not worker.twin.stale


def test_a_shadow_that_no_batch_can_reach_is_not_made(saver: RecordingSaver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the option is lowered; what was recorded goes, because the passes read another cache then."""
    worker = make_worker(saver, kv_shadow_from=CONTEXT + 1)
    monkeypatch.setattr(compat.adapter(), "request_limits", lambda: (1, None))
    first = worker.drafter._whole()
    assert worker.drafter.shadow() is None and not saver.allocated[KV_CACHE]
    worker.drafter.configure(RolloutConfig(group_size=32, **WHOLE, early_stop=False))
    second = worker.drafter._whole()
    assert second is not first and worker.drafter.shadow() is not None
    worker.drafter.configure(RolloutConfig(group_size=32, **WHOLE))
    assert worker.drafter._whole() is second
