"""Fingerprints of a few rows of every packed weight: they notice writes that came through no update call.

A trainer that shares the engine's memory can write a parameter without telling anybody. Comparing every weight with
what the twin was made from would cost as much as remaking the twin; comparing a few rows of each costs next to nothing
and sees every optimizer step that changes weights all over the place. A write that touches no sampled row is missed.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from sglang_er.twin.packed_linear import PackedLinear

ROWS = 4


class RowSamples:
    """`take` after packing; `changed` names the layers whose sampled rows differ since. Rows are drawn anew each time,
    so that a place that is missed today is seen another day."""

    def __init__(self, layers: Sequence[PackedLinear], seed: int = 0) -> None:
        self._layers = layers
        self._generator = torch.Generator().manual_seed(seed)
        self._rows: list[torch.Tensor] = []
        self._taken: torch.Tensor | None = None

    def take(self) -> None:
        self._rows = []
        for layer in self._layers:
            count = layer.packed.out_features
            rows = torch.randint(0, count, (min(ROWS, count),), generator=self._generator)
            self._rows.append(rows.to(layer.source().device))
        self._taken = self._fingerprints()

    def changed(self) -> list[str]:
        """Names of the layers that were written; empty before the first `take`. Waits for the device once."""
        if self._taken is None:
            return []
        differ = (self._fingerprints() != self._taken).tolist()
        return [layer.name for layer, written in zip(self._layers, differ) if written]

    def _fingerprints(self) -> torch.Tensor:
        """int64 [layers]: the bits of the rows as integers, each times an odd number that depends on its place."""
        prints = []
        for layer, rows in zip(self._layers, self._rows):
            picked = layer.source().detach().index_select(0, rows)
            bits = picked.view(torch.int16 if picked.element_size() == 2 else torch.int32).flatten().to(torch.int64)
            places = torch.arange(1, 2 * bits.numel(), 2, device=bits.device)
            prints.append((bits * places).sum())
        return torch.stack(prints)
