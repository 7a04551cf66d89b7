"""Packed experts: the mixture of the weights that they stand for, alone and on several ranks; where they stay exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.moe.token_dispatcher import StandardDispatchOutput
from sglang.srt.layers.moe.topk import StandardTopKOutput
from sglang.srt.layers.moe.utils import MoeRunnerBackend
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from support.mixtures import ROUNDING, Mixture, truth

from sglang_er.engine.dual_experts import DualPrecisionExperts, install_experts, refusal
from sglang_er.kernels import dequantize, quantize_pack, registry
from sglang_er.twin.packed_linear import PackedLinear
from sglang_er.twin.twin import Twin

EXPERTS, HIDDEN, INNER, CHOSEN, GROUP = 6, 96, 64, 2, 32


def weights_of(*shape: int) -> torch.Tensor:
    """Random [experts, rows, columns]."""
    return 0.1 * torch.randn(EXPERTS, *shape)


def packed(weight: torch.Tensor) -> PackedLinear:
    return PackedLinear("experts", lambda: weight.flatten(0, 1), GROUP)


def method() -> UnquantizedFusedMoEMethod:
    inner = UnquantizedFusedMoEMethod.__new__(UnquantizedFusedMoEMethod)
    torch.nn.Module.__init__(inner)
    return inner


def drafted(
    x: torch.Tensor, gate_up: PackedLinear, down: PackedLinear, experts: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """What the layer's method gives while the twin drafts."""
    twin = Twin()
    dispatched = StandardDispatchOutput(x, None, StandardTopKOutput(weights, experts, torch.empty(0)))
    with twin.draft_pass():
        out = DualPrecisionExperts(method(), gate_up, down, twin).apply(torch.nn.Module(), dispatched).hidden_states
    assert out.dtype == x.dtype and out.shape == x.shape and out is not x
    return out


def routed(tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    experts = torch.rand(tokens, EXPERTS).argsort(-1)[:, :CHOSEN].to(torch.int32)
    return torch.randn(tokens, HIDDEN), experts, torch.rand(tokens, CHOSEN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 7, 33])
def test_the_mixture_is_that_of_the_dequantized_weights(tokens: int, dtype: torch.dtype) -> None:
    """Another rank's experts (-1) add nothing."""
    torch.manual_seed(tokens)
    gate_up, down = packed(weights_of(2 * INNER, HIDDEN)), packed(weights_of(HIDDEN, INNER))
    x, experts, weights = routed(tokens)
    experts[1::3, 0] = -1
    of = Mixture(x.to(dtype), gate_up.packed, down.packed, experts, weights)
    expected, bound = truth(of, 4 * ROUNDING[dtype])
    got = drafted(of.x, gate_up, down, experts, weights)
    assert bool(((got.double() - expected).abs() <= bound).all())


def test_ranks_with_some_of_the_experts_each_add_up() -> None:
    """Expert parallelism: SGLang's dispatcher gives a rank its own numbers, and -1 for what is another's."""
    torch.manual_seed(1)
    w13, w2 = weights_of(2 * INNER, HIDDEN), weights_of(HIDDEN, INNER)
    x, experts, weights = routed(9)
    whole = drafted(x, packed(w13), packed(w2), experts, weights)
    parts = []
    for own in (range(4), range(4, EXPERTS)):
        local = torch.full((EXPERTS,), -1, dtype=torch.int32)
        local[own.start : own.stop] = torch.arange(len(own), dtype=torch.int32)
        mine = (packed(weight[own.start : own.stop]) for weight in (w13, w2))
        parts.append(drafted(x, *mine, local[experts.long()], weights))
    torch.testing.assert_close(sum(parts), whole)


def test_ranks_with_a_part_of_every_expert_add_up() -> None:
    """Tensor parallelism: whole groups of the inner size a rank."""
    torch.manual_seed(2)
    w13, w2 = weights_of(2 * INNER, HIDDEN), weights_of(HIDDEN, INNER)
    x, experts, weights = routed(9)
    whole = drafted(x, packed(w13), packed(w2), experts, weights)
    parts = []
    for first in range(0, INNER, GROUP):
        own = slice(first, first + GROUP)
        both = torch.cat([half[:, own] for half in w13.chunk(2, dim=1)], dim=1)
        parts.append(drafted(x, packed(both), packed(w2[:, :, own]), experts, weights))
    torch.testing.assert_close(sum(parts), whole)


def test_outside_of_a_draft_pass_the_layers_own_method_computes() -> None:
    class Exact(UnquantizedFusedMoEMethod):
        def __init__(self) -> None:
            torch.nn.Module.__init__(self)

        def apply(self, layer: Any, dispatch_output: Any) -> Any:
            return "exact"

    ours = DualPrecisionExperts(Exact(), packed(weights_of(32, 32)), packed(weights_of(32, 16)), Twin())
    assert ours.apply(None, None) == "exact"


def test_rows_of_a_packed_weight() -> None:
    whole = quantize_pack(torch.randn(80, 64), 32)
    part = whole.rows(16, 48)
    assert torch.equal(dequantize(part), dequantize(whole)[16:64])
    assert part.packed.data_ptr() == whole.packed[1:].data_ptr()
    for first, count in ((8, 16), (16, 8), (64, 32), (-16, 16)):
        with pytest.raises(ValueError, match="not whole blocks"):
            whole.rows(first, count)


def test_the_inner_method_is_no_module_of_the_layer() -> None:
    """SGLang's method is a torch module: registered in ours, which shares all it has, it would hang below itself."""
    inner = method()
    inner.register_parameter("scale", torch.nn.Parameter(torch.ones(1)))
    layer = torch.nn.Module()
    layer.quant_method = inner
    before = set(layer.state_dict())
    gate_up, down = packed(weights_of(2 * INNER, HIDDEN)), packed(weights_of(HIDDEN, INNER))
    layer.quant_method = DualPrecisionExperts(inner, gate_up, down, Twin())
    assert set(layer.state_dict()) == before
    assert repr(layer).count("UnquantizedFusedMoEMethod") == 0 and layer.quant_method.inner is inner
    assert isinstance(layer.quant_method, UnquantizedFusedMoEMethod)


def layer_on(device: str, runner: MoeRunnerBackend = MoeRunnerBackend.TRITON, **options: Any) -> Any:
    """What `refusal` looks at of a FusedMoE layer."""
    own = method()
    own.runner = SimpleNamespace(runner_backend=runner)
    own.w13_swiglu_interleaved = options.pop("interleaved", False)
    config = {"activation": "silu", "gemm1_alpha": None, "apply_router_weight_on_input": False} | options
    w13, w2 = (torch.empty(EXPERTS, *size, device=device) for size in ((2 * INNER, HIDDEN), (HIDDEN, INNER)))
    return SimpleNamespace(quant_method=own, moe_runner_config=SimpleNamespace(**config), w13_weight=w13, w2_weight=w2)


@pytest.fixture
def on_meta(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str | None]]:
    """`refusal` of a layer on a device that is no CPU and cannot compute, as there is no GPU here, with these kernels
    named; `problem`: what a self-test says, which cannot run on it."""

    def refused(names: str, *runner: MoeRunnerBackend, problem: str | None = None, **options: Any) -> str | None:
        monkeypatch.setenv(registry.ENVIRONMENT, names)
        monkeypatch.setattr(registry.self_test, "problem", lambda *_: problem)
        registry.candidates.cache_clear()
        return refusal(layer_on("meta", *runner, **options))

    yield refused
    monkeypatch.undo()
    registry.candidates.cache_clear()


def test_a_cpu_takes_any_runner_and_some_activations() -> None:
    assert refusal(layer_on("cpu")) is None
    assert refusal(layer_on("cpu", MoeRunnerBackend.TRITON_KERNELS)) is None
    assert refusal(layer_on("cpu", activation="gelu")) == "activation gelu"


NAMED = "cuda,triton,reference"
NO_KERNEL = "no kernel is seen correct on a GPU: --er-kernels cuda,triton,reference tries one"
MOVED = "weights in the layout of another runner: --moe-runner-backend triton"


@pytest.mark.parametrize(("names", "reason"), [("auto", NO_KERNEL), ("reference", NO_KERNEL), (NAMED, None)])
def test_a_gpu_quantizes_experts_only_for_a_kernel_of_its_own(names: str, reason: str | None, on_meta) -> None:
    assert on_meta(names) == reason


def test_a_kernel_that_fails_its_self_test_leaves_experts_exact(on_meta) -> None:
    assert on_meta(NAMED, problem="off by 3") == NO_KERNEL


def test_weights_that_a_runner_of_sglang_moved_around_stay_exact(on_meta) -> None:
    assert on_meta(NAMED, MoeRunnerBackend.FLASHINFER_TRTLLM) == MOVED
    assert on_meta(NAMED, interleaved=True) == MOVED


def test_experts_are_packed_as_other_layers_are() -> None:
    """With the group size and the clip search of the twin."""
    layer = SimpleNamespace(
        w13_weight=torch.nn.Parameter(torch.randn(EXPERTS, 2 * INNER, HIDDEN)),
        w2_weight=torch.nn.Parameter(torch.randn(EXPERTS, HIDDEN, INNER)),
        quant_method=UnquantizedFusedMoEMethod.__new__(UnquantizedFusedMoEMethod),
    )
    torch.nn.Module.__init__(layer.quant_method)
    twin = Twin()
    install_experts(twin, "experts", layer, partial(PackedLinear, group_size=GROUP, clip_search=True))
    for packed, weight in zip(twin.layers, (layer.w13_weight, layer.w2_weight), strict=True):
        searched = quantize_pack(weight.detach().flatten(0, 1), GROUP, clip_search=True)
        assert torch.equal(packed.packed.scales_zeros, searched.scales_zeros)
        assert torch.equal(packed.packed.packed, searched.packed)
