"""The KV shadow of whole passes: written behind every forward, in buckets, and counted in the KV pool's size."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sglang_er.config import ConfigError, RolloutConfig
from sglang_er.engine.graphs import EagerGraphs
from sglang_er.engine.pool_watch import shadow_pool
from sglang_er.engine.written_shadow import MOST_RECORDED, WrittenShadow, longest_context, with_shadow
from sglang_er.kernels import KvShadow, kv_shadow_store
from sglang_er.kernels.kv_shadow import FORMATS, ShadowFormat
from sglang_er.twin.kv_shadow import check_shadow, shadow_format

SLOTS, HEADS, DIM, LAYERS = 2000, 2, 64, 2


def runner(hierarchical: bool = False) -> SimpleNamespace:
    torch.manual_seed(0)
    keys, values = ([torch.randn(SLOTS, HEADS, DIM) for _ in range(LAYERS)] for _ in range(2))
    return SimpleNamespace(
        token_to_kv_pool=SimpleNamespace(k_buffer=keys, v_buffer=values),
        server_args=SimpleNamespace(enable_hierarchical_cache=hierarchical),
    )


def made(engine: SimpleNamespace, format: ShadowFormat = "int4") -> tuple[WrittenShadow, EagerGraphs]:
    graphs = EagerGraphs()
    return WrittenShadow(shadow_pool(engine, torch.ones(SLOTS, dtype=torch.uint8), format), graphs), graphs


@pytest.mark.parametrize("format", ["int4", "int8"])
@pytest.mark.parametrize("count", [1, 3, 64, MOST_RECORDED, MOST_RECORDED + 1, 1500])
def test_what_was_written_is_stored_and_nothing_else(format: ShadowFormat, count: int) -> None:
    engine = runner()
    shadow, graphs = made(engine, format)
    slots = 1 + torch.randperm(SLOTS - 1)[:count].to(torch.int32)
    shadow.written(slots)
    expected = torch.zeros(SLOTS, dtype=torch.uint8)
    expected[slots.long()] = 1
    expected[0] = shadow.pool.valid[0]  # padding
    assert torch.equal(shadow.pool.valid, expected)
    assert graphs.counts["called"] == (count <= MOST_RECORDED)
    pool = engine.token_to_kv_pool
    for layer in range(LAYERS):
        keys, values = pool.k_buffer[layer], pool.v_buffer[layer]
        alone = KvShadow.empty(SLOTS, HEADS, DIM, DIM, format)
        kv_shadow_store(keys, values, slots.long(), alone)
        for name in ("keys", "values", "key_scales", "value_scales"):
            got, wanted = getattr(shadow.pool.layers[layer], name), getattr(alone, name)
            assert torch.equal(got[slots.long()], wanted[slots.long()]), name


def test_one_graph_serves_a_bucket() -> None:
    """What the second pass leaves behind of the first one's slots must not be stored as its own."""
    engine = runner()
    shadow, _ = made(engine)
    shadow.written(torch.tensor([5, 6, 7]))
    shadow.pool.valid.zero_()
    shadow.written(torch.tensor([9, 10, 11]))
    assert shadow.pool.valid.nonzero().flatten().tolist() in ([9, 10, 11], [0, 9, 10, 11])


def test_a_pool_with_another_writer_is_refused() -> None:
    with pytest.raises(ValueError, match="--er-kv-shadow off"):
        made(runner(hierarchical=True))


@pytest.mark.parametrize(
    ("options", "device", "format"),
    [
        ({}, "cuda", None),
        ({}, "cpu", "int4"),
        ({"kv_shadow": "int8"}, "cuda", "int8"),
        ({"kv_shadow": "fp8"}, "cuda", "fp8"),
        ({"kv_shadow": "off"}, "cpu", None),
    ],
)
def test_unproven_on_a_gpu_it_has_to_be_named(options: dict[str, str], device: str, format: str | None) -> None:
    assert shadow_format(RolloutConfig(**options), device) == format


@pytest.mark.parametrize("options", [{}, {"executor": "wrapped"}, {"kernels": "reference"}], ids=str)
def test_fp8_is_refused_where_compiled_kernels_would_read_it(options: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="--er-kv-shadow int8") as error:
        check_shadow(RolloutConfig(kv_shadow="fp8", **options), "cpu")
    assert "\n" not in str(error.value)
    check_shadow(RolloutConfig(kv_shadow="int8", **options), "cpu")
    check_shadow(RolloutConfig(kv_shadow="fp8", **options), "cuda")


def test_plain_torch_reads_fp8_on_a_cpu() -> None:
    check_shadow(RolloutConfig(kv_shadow="fp8", executor="wrapped", kernels="reference"), "cpu")


@pytest.mark.parametrize("format", FORMATS)
def test_the_pool_is_sized_for_both(format: ShadowFormat) -> None:
    """A token of 28 layers with 4 KV heads of 128 in bf16, and what the shadow's tensors really take of it."""
    cell = 28 * 4 * 128 * 2 * 2
    config = RolloutConfig(kv_shadow=format, draft_graphs="on")
    shadow = KvShadow.empty(100, 4, 128, 128, format)
    assert with_shadow(cell, config, "cuda", 128, torch.bfloat16, 1 << 20) == cell + 28 * shadow.nbytes // 100 + 1
    assert with_shadow(cell, config, "cpu", 128, torch.bfloat16, 1 << 20) == cell
    assert with_shadow(cell, RolloutConfig(kv_shadow="off"), "cuda", 128, torch.bfloat16, 1 << 20) == cell
    assert with_shadow(cell, config, "cuda", 128, torch.bfloat16, config.kv_shadow_from - 1) == cell


@pytest.mark.parametrize(
    ("context", "requests", "slots", "longest"),
    [
        (512, None, None, 128 * 512),  # larger batches are drafted token by token, and read no shadow
        (512, 4, None, 2048),
        (32768, 4, 16384, 16384),
        (512, 1000, 1 << 20, 128 * 512),
    ],
)
def test_how_long_the_context_of_a_pass_may_get(
    context: int, requests: int | None, slots: int | None, longest: int
) -> None:
    assert longest_context(context, requests, slots) == longest
