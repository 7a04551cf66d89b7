"""Copies of a few rows of every packed weight: they notice writes that came through no update call.

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
        self._counts = torch.tensor([[layer.packed.out_features] for layer in layers], dtype=torch.float64)
        self._generator = torch.Generator().manual_seed(seed)
        self._rows: list[torch.Tensor] = []
        self._taken: list[torch.Tensor] = []

    def take(self) -> None:
        """A few operations a layer: part of every remaking of the twin."""
        drawn = torch.rand(len(self._layers), ROWS, dtype=torch.float64, generator=self._generator) * self._counts
        rows = drawn.long()
        if self._layers:  # all on one device: one copy of the numbers for all
            rows = rows.to(self._layers[0].source().device)
        self._rows = list(rows.unbind())
        self._taken = self._bits()

    def changed(self) -> list[str]:
        """Names of the layers that were written; empty before the first `take`. Waits for the device once."""
        if not self._taken:
            return []
        differ = torch.stack([(now != then).any() for now, then in zip(self._bits(), self._taken)]).tolist()
        return [layer.name for layer, written in zip(self._layers, differ) if written]

    def _bits(self) -> list[torch.Tensor]:
        """The rows as integers: a NaN equals itself, a zero of the other sign does not."""
        picked = []
        for layer, rows in zip(self._layers, self._rows):
            chosen = layer.source().detach().index_select(0, rows)
            picked.append(chosen.view(torch.int16 if chosen.element_size() == 2 else torch.int32))
        return picked
