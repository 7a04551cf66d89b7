"""What a CUDA graph could not hold, seen without one: looks of the host at a tensor's values."""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class HostReads(TorchDispatchMode):
    """Within it, which torch ops are called (`names`), and those that look at a value or allocate by one (`found`)."""

    SUSPECTS = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "unique", "masked_select")

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func)
        self.names.append(name)
        if any(suspect in name for suspect in self.SUSPECTS) or _by_mask(name, args):
            self.found.append(f"{name} from {_caller()}")
        return func(*args, **(kwargs or {}))


def _caller() -> str:
    """The last lines outside of torch that led here."""
    frames = [frame for frame in traceback.extract_stack()[:-2] if "/torch/" not in frame.filename]
    return " < ".join(f"{frame.filename}:{frame.lineno}" for frame in frames[:-5:-1])


def _by_mask(name: str, args: Any) -> bool:
    """Indexing by a mask allocates by how many it has."""
    if "index" not in name or len(args) < 2 or not isinstance(args[1], (list, tuple)):
        return False
    return any(isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8) for index in args[1])
