"""The self-test before first use: it passes what works, and sees every way in which a kernel was wrong on some GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sglang_er.kernels import MarlinWeight, PackedWeight, registry, self_test, self_test_sampling
from sglang_er.kernels.self_test_draw import reference_of

OPS = (
    "choose_seeded",
    "dequantize",
    "draft_sample",
    "kv_shadow_store",
    "paged_attention",
    "quantize_pack",
    "sample_rows",
    "softmax_rows",
    "verify_chain",
    "w4a16_experts",
    "w4a16_linear",
    "w4a8_linear",
)
MANY_ROWS = 8  # from where Triton's kernels take larger tiles
DRAFT_SIZES = self_test_sampling.draft_sizes
DTYPES = {"sample_rows": (torch.float32,), "verify_chain": (torch.float32,)}


def implementations(op: str) -> list[registry.Implementation]:
    return [entry for entry in registry.implementations(op) if entry.device in (None, "cpu")]


@pytest.mark.parametrize("op", OPS)
def test_what_works_passes(op: str):
    for entry in implementations(op):
        for dtype in DTYPES.get(op, (torch.bfloat16, torch.float32)):
            assert self_test.problem(op, entry.function, "cpu", dtype, entry.serves) is None, entry.name


def test_a_draw_of_a_gpus_sizes_passes(monkeypatch: pytest.MonkeyPatch):
    """Interpreted kernels: as many rows, of fewer blocks."""
    rows, size = DRAFT_SIZES("cuda:0")
    assert rows > MANY_ROWS
    for entry in implementations("draft_sample"):
        sizes = (rows, 2500 if entry.name == "triton" else size)
        monkeypatch.setattr(self_test_sampling, "draft_sizes", lambda _, sizes=sizes: sizes)
        for dtype in (torch.bfloat16, torch.float32):
            assert self_test.problem("draft_sample", entry.function, "cpu", dtype, entry.serves) is None, entry.name


def test_what_a_draw_leaves_behind_is_seen_by_the_next():
    """As of counters that are not set back: the same call a second time."""
    function, calls = registry.resolve("draft_sample", "cpu", torch.float32, "reference").function, []

    def wrong(*arguments: Any) -> None:
        function(*arguments)
        calls.append(arguments[0])
        if len(calls) % 2 == 0:
            arguments[-2][0] += 1

    assert "drew" in (self_test.problem("draft_sample", wrong, "cpu", torch.float32) or "") and len(calls) == 2


def test_products_of_many_steps_are_tried_with_few_rows_and_with_many(monkeypatch: pytest.MonkeyPatch):
    """Those that ask for the most shared memory; on a GPU."""
    on_gpu = self_test.mixtures("cuda:0")
    assert len(on_gpu) > len(self_test.mixtures("cpu"))
    monkeypatch.setattr(self_test, "mixtures", lambda _: on_gpu)
    for rows in (1, 20):

        def wrong(*arguments: Any, rows: int = rows) -> None:
            if arguments[0].shape[0] == rows and arguments[0].shape[1] > 2048:
                raise RuntimeError("out of resource: shared memory")
            registry.resolve("w4a16_experts", "cpu", torch.float32, "reference").function(*arguments)

        assert "shared memory" in (self_test.problem("w4a16_experts", wrong, "cpu", torch.float32) or "")


@pytest.mark.parametrize("op", OPS)
def test_an_output_that_is_not_written_is_seen(op: str):
    assert self_test.problem(op, lambda *_: None, "cpu", torch.float32)


def spoiled(op: str, spoil: Callable[[tuple[Any, ...]], None]) -> Callable[..., None]:
    function = registry.resolve(op, "cpu", torch.float32, "reference").function

    def wrong(*arguments: Any) -> None:
        function(*arguments)
        spoil(arguments)

    return wrong


def first_bit(tensor: torch.Tensor) -> None:
    tensor.view(torch.uint8).flatten()[0] ^= 1


def in_marlins(weight: object, buffer: str) -> None:
    if isinstance(weight, MarlinWeight):
        first_bit(getattr(weight, buffer))


def keep_one_more(q: torch.Tensor) -> None:
    q.view(-1)[(q == 0).flatten().nonzero()[:1]] = 1e-6


@pytest.mark.parametrize(
    ("op", "spoil"),
    [
        ("quantize_pack", lambda arguments: first_bit(arguments[-1].packed)),
        ("quantize_pack", lambda arguments: in_marlins(arguments[-1], "placed_zeros")),
        ("quantize_pack", lambda arguments: in_marlins(arguments[-1], "placed_scales")),
        ("kv_shadow_store", lambda arguments: arguments[-1].values[90].bitwise_xor_(1)),
        ("paged_attention", lambda arguments: arguments[-1][1, 3, 7].add_(0.1)),
        ("sample_rows", lambda arguments: arguments[-1][2].add_(1)),
        ("choose_seeded", lambda arguments: arguments[-1][4].add_(1)),
        ("draft_sample", lambda arguments: arguments[-2][2].add_(1)),
        ("draft_sample", lambda arguments: keep_one_more(arguments[-1])),
        ("verify_chain", lambda arguments: arguments[-2][1, 0].add_(1)),
        ("verify_chain", lambda arguments: arguments[-1][3].sub_(1)),
        ("softmax_rows", lambda arguments: arguments[-1][2, 4999].add_(0.01)),
        ("w4a16_experts", lambda arguments: arguments[-1][0, 79].mul_(1.5).add_(30)),
        ("w4a16_linear", lambda arguments: arguments[-1][-1, -1].mul_(1.5).add_(0.5)),
    ],
)
def test_one_wrong_value_is_seen(op: str, spoil: Callable[[tuple[Any, ...]], None]):
    assert self_test.problem(op, spoiled(op, spoil), "cpu", torch.float32)


def test_a_wrong_product_of_marlins_layout_alone_is_seen():
    """In its second size too, which the kernel cuts into other tiles."""
    for rows in (192, 256):

        def spoil(arguments: tuple[Any, ...], rows: int = rows) -> None:
            if isinstance(arguments[1], MarlinWeight) and arguments[1].out_features == rows:
                arguments[-1][0, 7] += 20

        assert self_test.problem("w4a16_linear", spoiled("w4a16_linear", spoil), "cpu", torch.float32)


@pytest.mark.parametrize("op", ["quantize_pack", "w4a16_linear"])
def test_one_that_takes_nothing_has_not_passed(op: str):
    assert self_test.problem(op, lambda *_: None, "cpu", torch.float32, lambda *_: False)


def test_an_error_is_a_problem_with_its_reason():
    def broken(*_: object) -> None:
        raise RuntimeError("first line\nno kernel image is available")

    assert self_test.problem("dequantize", broken, "cpu", torch.float32) == "RuntimeError: no kernel image is available"


def test_the_truth_is_made_of_copies_on_the_processor():
    """Products on a GPU may be less exact than the kernel that is tried."""
    weight, out, seen = PackedWeight.empty(16, 64, 32), torch.zeros(2, 2), []

    def reference(x: torch.Tensor, packed: PackedWeight, scale: float, result: torch.Tensor) -> None:
        seen.append((packed.packed.device.type, packed.shape, scale))
        result.copy_(x * scale)

    reference_of(reference, torch.ones(2, 2), weight, 3.0, out)
    assert seen == [("cpu", (16, 64), 3.0)] and out.tolist() == [[3.0, 3.0]] * 2
