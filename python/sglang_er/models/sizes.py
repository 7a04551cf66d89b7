"""Layer sizes of the public models that the big shapes imitate, from those models' published configurations.

The embedding is untied everywhere (some of the originals tie it): the twin quantizes the output matrix alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang_er.models.tiny import Shape


@dataclass(frozen=True)
class PublicSize:
    """A public model's name and its layer sizes."""

    name: str
    shape: Shape


BIG_SHAPES = ("0.5b", "1.5b", "7b")

_SIZES: dict[tuple[str, str], PublicSize] = {
    ("qwen3", "0.5b"): PublicSize("Qwen3-0.6B", Shape(1024, 28, 16, 8, 128, 3072, 151936)),
    ("qwen3", "1.5b"): PublicSize("Qwen3-1.7B", Shape(2048, 28, 16, 8, 128, 6144, 151936)),
    ("qwen3", "7b"): PublicSize("Qwen3-8B", Shape(4096, 36, 32, 8, 128, 12288, 151936)),
    ("qwen2", "0.5b"): PublicSize("Qwen2.5-0.5B", Shape(896, 24, 14, 2, 64, 4864, 151936)),
    ("qwen2", "1.5b"): PublicSize("Qwen2.5-1.5B", Shape(1536, 28, 12, 2, 128, 8960, 151936)),
    ("qwen2", "7b"): PublicSize("Qwen2.5-7B", Shape(3584, 28, 28, 4, 128, 18944, 152064)),
    ("llama", "0.5b"): PublicSize("SmolLM2-360M", Shape(960, 32, 15, 5, 64, 2560, 49152)),
    ("llama", "1.5b"): PublicSize("Llama-3.2-1B", Shape(2048, 16, 32, 8, 64, 8192, 128256)),
    ("llama", "7b"): PublicSize("Llama-3.1-8B", Shape(4096, 32, 32, 8, 128, 14336, 128256)),
    ("mistral", "7b"): PublicSize("Mistral-7B-v0.3", Shape(4096, 32, 32, 8, 128, 14336, 32768)),
}


def public_size(arch: str, shape: str) -> PublicSize:
    """The public model whose sizes `shape` has in architecture `arch`. Raises ValueError if there is none."""
    try:
        return _SIZES[arch, shape]
    except KeyError:
        known = sorted(f"--arch {a} --shape {s}" for a, s in _SIZES)
        raise ValueError(f"no size for --arch {arch} --shape {shape}; there are: {', '.join(known)}") from None
