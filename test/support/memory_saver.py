"""A memory saver for tests on a CPU: SGLang's interface, and what happens to memory on a GPU as far as anybody can see.

It knows every tensor that was allocated inside a region, scratch memory included, and what was released comes back full
of garbage at the same address.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from sglang.srt.utils.torch_memory_saver_adapter import TorchMemorySaverAdapter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GARBAGE = 0xA5


def garble(tensor: torch.Tensor) -> None:
    """Every byte of it, whatever it holds; no flag of a shadow is clear then."""
    tensor.detach().view(torch.uint8).fill_(GARBAGE)


class _Allocations(TorchDispatchMode):
    """Keeps what is allocated while it is on, by address."""

    def __init__(self, kept: dict[int, torch.UntypedStorage]) -> None:
        super().__init__()
        self._kept = kept

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if _is_tensor(leaf)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if _is_tensor(leaf) and (storage := leaf.untyped_storage()).data_ptr() not in given:
                self._kept[storage.data_ptr()] = storage
        return result


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor)


class RecordingSaver(TorchMemorySaverAdapter):
    enabled = True

    def __init__(self) -> None:
        self.allocated: dict[str, dict[int, torch.UntypedStorage]] = defaultdict(dict)
        self.recordings: list[dict[str, Any]] = []
        self.backups: set[str] = set()

    @contextmanager
    def region(self, tag: str, enable_cpu_backup: bool = False) -> Iterator[None]:
        if enable_cpu_backup:
            self.backups.add(tag)
        with _Allocations(self.allocated[tag]):
            yield

    @contextmanager
    def cuda_graph(self, **kwargs: Any) -> Iterator[None]:
        self.recordings.append(kwargs)
        yield

    def pause(self, tag: str) -> None:
        for storage in self.allocated[tag].values():
            garble(torch.tensor([], dtype=torch.uint8).set_(storage))

    resume = pause

    def nbytes(self, tag: str) -> int:
        return sum(storage.nbytes() for storage in self.allocated[tag].values())
