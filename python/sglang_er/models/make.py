"""`make_model`: writes the checkpoint of a shape and an architecture, and its card."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sglang_er.models import flat, sizes, tiny
from sglang_er.models.card import ModelCard
from sglang_er.models.tiny import Shape

if TYPE_CHECKING:
    import torch

SHAPES = ("tiny", *sizes.BIG_SHAPES, "flat")
ARCHITECTURES = flat.ARCHITECTURES
DTYPES = ("bfloat16", "float32")
DEFAULT_ALPHA = 0.95
MAX_KAPPA = 16.0
_TASK = "It solves the written-out addition task of `sglang_er.models.task`."


def known_kappa(arch: str, shape: str, target_alpha: float, seed: int) -> dict[str, float] | None:
    """The committed measurement {kappa, alpha} for exactly these choices, if there is one."""
    table = json.loads((resources.files(__package__) / "assets" / "kappa.json").read_text(encoding="utf-8"))
    for row in table:
        if (row["arch"], row["shape"], row["target_alpha"], row["seed"]) == (arch, shape, target_alpha, seed):
            return {"kappa": row["kappa"], "alpha": row["alpha"]}
    return None


def _check_target(shape: str, target_alpha: float | None, kappa: float | None) -> float | None:
    for name, value in (("--target-alpha", target_alpha), ("--kappa", kappa)):
        if value is not None and shape not in sizes.BIG_SHAPES:
            raise ValueError(f"{name} applies to {', '.join(sizes.BIG_SHAPES)}, not to --shape {shape}")
    if target_alpha is not None and kappa is not None:
        raise ValueError("--target-alpha and --kappa exclude each other")
    if kappa is not None and not 0.0 <= kappa <= MAX_KAPPA:
        raise ValueError(f"--kappa must be in 0..{MAX_KAPPA:.0f}, got {kappa}")
    if kappa is not None or shape not in sizes.BIG_SHAPES:
        return None
    target = DEFAULT_ALPHA if target_alpha is None else target_alpha
    if not 0.5 <= target < 1.0:
        raise ValueError(f"--target-alpha must be at least 0.5 and below 1, got {target}")
    return target


def make_model(
    shape: str,
    arch: str,
    out: Path,
    target_alpha: float | None = None,
    dtype: str = "bfloat16",
    seed: int = 0,
    kappa: float | None = None,
    progress: Callable[[str], None] = print,
) -> ModelCard:
    """Write a checkpoint into the new or empty directory `out` and return its card.

    Raises ValueError for a choice that does not exist or a target that cannot be reached, FileExistsError where `out`
    has content. A run that fails leaves nothing behind in `out`.
    """
    if shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}: choose one of {', '.join(SHAPES)}")
    if dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: choose one of {', '.join(DTYPES)}")
    known = flat.ARCHITECTURES if shape == "flat" else tiny.ARCHITECTURES
    if arch not in known:
        raise ValueError(f"--shape {shape} has no architecture {arch!r}: choose one of {', '.join(known)}")
    target = _check_target(shape, target_alpha, kappa)
    if shape in sizes.BIG_SHAPES:
        sizes.public_size(arch, shape)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileExistsError(f"{out} exists and is not an empty directory")

    import torch

    kind = getattr(torch, dtype)
    if shape == "flat":
        config, tensors, card = _flat(arch, kind, dtype, seed)
    elif shape == "tiny":
        config, tensors, card = _tiny(arch, kind, dtype, seed)
    else:
        config, tensors, card = _big(shape, arch, target, kappa, kind, dtype, seed, progress)

    from sglang_er.models import checkpoint

    out = out.resolve()
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        checkpoint.write_metadata(partial, config)
        written = checkpoint.write_weights(partial, tensors)
        card.write(partial)
        if out.exists():
            out.rmdir()
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    progress(f"wrote {out}: {written / 1e6:,.1f} MB of weights")
    return card


Parts = tuple[dict[str, Any], Iterator[tuple[str, "torch.Tensor"]], ModelCard]


def _card(shape: str, arch: str, sizes_of: str, layer_sizes: Shape, dtype: str, seed: int, **rest: Any) -> ModelCard:
    return ModelCard(
        shape=shape,
        arch=arch,
        sizes_of=sizes_of,
        sizes=asdict(layer_sizes),
        parameters=layer_sizes.parameters(),
        dtype=dtype,
        seed=seed,
        **({"target_alpha": None, "alpha": None, "kappa": None} | rest),
    )


def _flat(arch: str, kind: torch.dtype, dtype: str, seed: int) -> Parts:
    card = _card(
        "flat", arch, "no public model", flat.FLAT, dtype, seed,
        function="Random weights: a flat distribution, for tests of exactness.", alpha_source="not measured",
    )  # fmt: skip
    return flat.config(arch, dtype), flat.tensors(arch, kind, seed), card


def _tiny(arch: str, kind: torch.dtype, dtype: str, seed: int) -> Parts:
    weights = tiny.load_weights(arch)
    card = _card(
        "tiny", arch, "no public model", tiny.TINY, dtype, seed,
        function=f"A small transformer, trained by scripts/train_tiny.py. {_TASK}",
        alpha_source="docs/models.md has the measurement",
    )  # fmt: skip
    return tiny.hf_config(arch, tiny.TINY, dtype), ((name, value.to(kind)) for name, value in weights.items()), card


def _big(
    shape: str,
    arch: str,
    target: float | None,
    kappa: float | None,
    kind: torch.dtype,
    dtype: str,
    seed: int,
    progress: Callable[[str], None],
) -> Parts:
    from sglang_er.models.expand import Expansion

    size = sizes.public_size(arch, shape)
    reached, source = None, "not measured: kappa was given"
    if target is not None:
        kappa, reached, source = _kappa_for(shape, arch, target, seed, progress)
    assert kappa is not None  # _check_target gives a target where there is no kappa
    model = Expansion(arch, size.shape, kappa, seed)
    card = _card(
        shape, arch, size.name, model.shape, dtype, seed,
        function=f"The layer sizes of {size.name}, the function of the small trained model. {_TASK}",
        target_alpha=target, alpha=reached, alpha_source=source, kappa=kappa,
    )  # fmt: skip
    return tiny.hf_config(arch, model.shape, dtype), model.tensors(kind), card


def _kappa_for(
    shape: str, arch: str, target: float, seed: int, progress: Callable[[str], None]
) -> tuple[float, float, str]:
    """kappa, the alpha that it gives, and where that was measured: the committed table, or here and now."""
    found = known_kappa(arch, shape, target, seed)
    if found is not None:
        return found["kappa"], found["alpha"], "measured when the project was built, docs/models.md"
    import torch

    from sglang_er.models import alpha, streams
    from sglang_er.models.expand import Expansion

    size = sizes.public_size(arch, shape).shape
    progress(f"searching the kappa for alpha {target}: each try makes and runs all {size.layers} layers")
    batch = streams.text_batch()
    with torch.inference_mode():
        kappa, reached = alpha.find_kappa(
            lambda kappa: alpha.measure(Expansion(arch, size, kappa, seed), *batch), target, progress
        )
    return kappa, reached, "measured when this checkpoint was made"
