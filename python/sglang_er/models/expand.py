"""A big model that computes what a small one computes, so that speed is that of its size (see docs/models.md).

The big residual stream is Qd x: the small one's x, rotated by Qd [D, d] with orthonormal columns. Weights that read
the stream get dense noise of size `kappa` that meets only the complement of Qd, where the stream is 0; heads and
neurons are copied, and the copies' output weights get a little noise that sums to 0. So noise changes no function; but
rounding to int4 mixes it in, and the acceptance of a W4 draft falls as kappa grows.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from sglang_er.models.guard import guard_direction, logit_shift
from sglang_er.models.tiny import TINY, Shape, load_weights

if TYPE_CHECKING:
    import torch

#: Logit of an unused vocabulary row = PAD_STRENGTH * (final hidden state, root mean square 1) . (guard direction). The
#: product is -0.5 at most on the text that `guard` sees, and was -0.09 at worst on 14,000 positions of other text.
PAD_STRENGTH = 512.0
#: Noise of what writes the stream, relative to a copy's share of the small model's weight. Small, and not kappa: what
#: rounding puts outside Qd's span is read with gain kappa and written back with this gain, in every layer. With both at
#: 1.16 the bf16 model drowned in its own rounding (1 - TV against fp32 was .41); now it is .999 where alpha is .95.
WRITER_NOISE = 0.25
#: Rows that are made at once, where a matrix is as long as the vocabulary.
CHUNK_ROWS = 8192


def _copies(count: int, sources: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of `count` units, unit j copies source j % sources: how their noise cancels.

    Returns three tensors [count]: how many copies j's source has, the row of noise that j uses, and its coefficient.

    The noise of the copies of one source cancels: they pair up as (z, -z), an odd rest as (z, z, -2z) / sqrt(2).
    """
    import torch

    unit = torch.arange(count)
    number = torch.bincount(unit % sources, minlength=sources)[unit % sources]
    rank = unit // sources
    triple = (number % 2 == 1) & (number > 1) & (rank >= number - 3)
    pair = torch.where(triple, (number - 3) // 2, rank // 2)
    paired = torch.where(number == 1, 0.0, 1.0 - 2.0 * (rank % 2))
    coefficient = torch.where(triple, torch.where(rank == number - 1, -(2**0.5), 0.5**0.5), paired)
    return number, pair * sources + unit % sources, coefficient


class Expansion:
    """The trained small model of `arch` at the layer sizes of `shape`; with `weights`, one that was trained further.

    Layers are made one at a time, in fp32, from `seed`: nothing is kept. Raises ValueError if the shape cannot hold the
    small model: narrower stream, too few layers, or fewer than two copies of a head or neuron.
    """

    def __init__(
        self, arch: str, shape: Shape, kappa: float, seed: int = 0, weights: Mapping[str, torch.Tensor] | None = None
    ) -> None:
        import torch

        if (
            shape.hidden < TINY.hidden
            or shape.layers < TINY.layers
            or shape.query_heads < 2 * TINY.query_heads
            or shape.mlp < 2 * TINY.mlp
            or shape.head_dim % TINY.head_dim
            or shape.vocab < TINY.vocab
        ):
            raise ValueError(f"a model of shape {shape} is too small to hold the trained one, {TINY}")
        self.kappa = kappa
        self.seed = seed
        self.ratio = TINY.hidden / shape.hidden  # d / D
        self.shape = replace(shape, eps=TINY.eps * self.ratio, rope_theta=TINY.rope_theta)
        self.small = {name: value.float() for name, value in (weights or load_weights(arch)).items()}
        self.guard, self.shift = guard_direction(arch), logit_shift(arch)
        self.rotation = self._make_rotation(self.guard)
        #: Big layer -> small layer that it copies; the others read as one but write 0.
        self.real = {i * shape.layers // TINY.layers: i for i in range(TINY.layers)}
        # A small rotary pair i turns as fast as pair i * (big head_dim / small head_dim) of a longer head.
        stride, half = shape.head_dim // TINY.head_dim, TINY.head_dim // 2
        first = torch.arange(half) * stride
        self.coordinates = torch.cat([first, first + shape.head_dim // 2])

    def _generator(self, name: str) -> torch.Generator:
        import torch

        return torch.Generator().manual_seed(zlib.crc32(f"{self.seed}/{name}".encode()))

    def _make_rotation(self, guard: torch.Tensor) -> torch.Tensor:
        """Qd [D, d]. Qd guard has entries of one magnitude: rows along it survive rounding to int4 unharmed."""
        import torch

        basis = torch.randn(self.shape.hidden, TINY.hidden, generator=self._generator("rotation"), dtype=torch.float64)
        basis[:, 0] = basis[:, 0].sign()
        rotation, upper = torch.linalg.qr(basis)
        rotation = rotation * upper.diagonal().sign()
        # The reflection that swaps the guard direction and coordinate 0.
        mirror = guard.double().clone()
        mirror[0] -= 1.0
        mirror /= mirror.norm()
        return (rotation - 2.0 * torch.outer(rotation @ mirror, mirror)).float()

    def _reader(self, name: str, weight: torch.Tensor, gain: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """[len(rows), D]: row j computes row rows[j] of diag(gain) folded into `weight`; -1 computes 0."""
        import torch

        scaled = weight * gain * self.ratio**0.5
        noise = torch.randn(len(rows), self.shape.hidden, generator=self._generator(name))
        noise.addmm_(noise @ self.rotation, self.rotation.T, alpha=-1.0).mul_(self.kappa * float(scaled.std()))
        return noise.addmm_(torch.where(rows[:, None] >= 0, scaled[rows], 0.0), self.rotation.T)

    def _writer(self, name: str, weight: torch.Tensor, count: int, sources: int, real: bool) -> torch.Tensor:
        """[D, count]: column j writes column j % sources of `weight` [d, sources] over its number of copies, or 0."""
        import torch

        number, row, coefficient = _copies(count, sources)
        noise = torch.randn(int(row.max()) + 1, self.shape.hidden, generator=self._generator(name))[row]
        size = WRITER_NOISE * float(weight.std()) * self.ratio**0.5
        noise *= (coefficient * size / number)[:, None]
        if real:
            noise += (weight.T[torch.arange(count) % sources] / number[:, None]) @ self.rotation.T
        return noise.T.contiguous()

    def _head_rows(self, heads: int, small_heads: int) -> torch.Tensor:
        """For each output row of a big projection, the small projection's row that it computes, or -1."""
        import torch

        rows = torch.full((heads, self.shape.head_dim), -1)
        for head in range(heads):
            rows[head, self.coordinates] = torch.arange(TINY.head_dim) + (head % small_heads) * TINY.head_dim
        return rows.flatten()

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        """The weights of big layer `index`, fp32, by Hugging Face name without the layer's prefix."""
        import torch

        source = self.small_layer(index)
        prefix = f"model.layers.{source}."
        small = {name[len(prefix) :]: value for name, value in self.small.items() if name.startswith(prefix)}
        shape, stretch = self.shape, self.shape.head_dim / TINY.head_dim
        real = index in self.real
        made = {
            "input_layernorm.weight": torch.ones(shape.hidden),
            "post_attention_layernorm.weight": torch.ones(shape.hidden),
        }
        heads = {"q": (shape.query_heads, TINY.query_heads), "k": (shape.kv_heads, TINY.kv_heads)}
        normed = "self_attn.q_norm.weight" in small
        for kind, (big, little) in (heads | {"v": heads["k"]}).items():
            weight = small[f"self_attn.{kind}_proj.weight"]
            if kind != "v":
                # Attention divides by sqrt(head_dim), so a longer head needs larger products. With QK norm the gains
                # below see to that, and the vector before it only has to be scaled as the epsilon is.
                weight = weight * ((stretch * self.ratio) ** 0.5 if normed else stretch**0.25)
            name = f"self_attn.{kind}_proj"
            rows = self._head_rows(big, little)
            made[f"{name}.weight"] = self._reader(f"{index}.{name}", weight, small["input_layernorm.weight"], rows)
            if f"{name}.bias" in small:
                made[f"{name}.bias"] = torch.zeros(len(rows))
            if normed and kind != "v":
                gain = small[f"self_attn.{kind}_norm.weight"]
                made[f"self_attn.{kind}_norm.weight"] = torch.full((shape.head_dim,), float(gain.mean()))
                made[f"self_attn.{kind}_norm.weight"][self.coordinates] = gain
                made[f"self_attn.{kind}_norm.weight"] *= stretch**-0.25
        made["self_attn.o_proj.weight"] = self._attention_writer(index, small["self_attn.o_proj.weight"], real)
        neurons = torch.arange(shape.mlp) % TINY.mlp
        for kind in ("gate", "up"):
            made[f"mlp.{kind}_proj.weight"] = self._reader(
                f"{index}.mlp.{kind}_proj",
                small[f"mlp.{kind}_proj.weight"],
                small["post_attention_layernorm.weight"],
                neurons,
            )
        made["mlp.down_proj.weight"] = self._writer(
            f"{index}.mlp.down_proj", small["mlp.down_proj.weight"], shape.mlp, TINY.mlp, real
        )
        return made

    def _attention_writer(self, index: int, weight: torch.Tensor, real: bool) -> torch.Tensor:
        """o_proj [D, query_heads * head_dim]. Columns whose coordinate the small head lacks are noise and read 0."""
        import torch

        shape = self.shape
        wide = torch.zeros(TINY.hidden, TINY.query_heads, shape.head_dim)
        wide[:, :, self.coordinates] = weight.unflatten(1, (TINY.query_heads, TINY.head_dim))
        columns = shape.query_heads * shape.head_dim
        return self._writer(
            f"{index}.self_attn.o_proj", wide.flatten(1), columns, TINY.query_heads * shape.head_dim, real
        )

    def small_layer(self, index: int) -> int:
        """The small layer whose weights big layer `index` reads with: the last one at or before it."""
        return max(small for big, small in self.real.items() if big <= index)

    def embedding(self, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of the input embedding; beyond the small vocabulary they repeat it: any id is harmless."""
        import torch

        return self.small["model.embed_tokens.weight"][torch.arange(start, stop) % TINY.vocab] @ self.rotation.T

    def head(self, start: int, stop: int) -> torch.Tensor:
        """Rows start..stop of the output matrix. Beyond the small vocabulary a row's logit is far below every other."""
        import torch

        pad = (self.rotation @ self.guard).sign() * (PAD_STRENGTH * (self.ratio / self.shape.hidden) ** 0.5)
        rows = pad.repeat(stop - start, 1)
        if start < TINY.vocab:
            if start != 0 or stop < TINY.vocab:
                raise ValueError("the rows of the small vocabulary are made together")
            weight = self.small["lm_head.weight"] * self.small["model.norm.weight"] - self.shift
            rows[: TINY.vocab] = self._reader("lm_head", weight, torch.ones(TINY.hidden), torch.arange(TINY.vocab))
        return rows

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor of the checkpoint by its Hugging Face name, one after the other."""
        import torch

        for name, rows in (("model.embed_tokens.weight", self.embedding), ("lm_head.weight", self.head)):
            table = torch.empty(self.shape.vocab, self.shape.hidden, dtype=dtype)
            for start in range(0, self.shape.vocab, CHUNK_ROWS):
                stop = min(start + CHUNK_ROWS, self.shape.vocab)
                table[start:stop] = rows(start, stop)
            yield name, table
        for index in range(self.shape.layers):
            for name, value in self.layer(index).items():
                yield f"model.layers.{index}.{name}", value.to(dtype)
        yield "model.norm.weight", torch.ones(self.shape.hidden, dtype=dtype)
