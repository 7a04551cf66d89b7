"""Huge pages behind weights, twin and KV pool: a forward streams all of them, 4 KiB of address translation at a time.

Asked for in place, after the tensors were filled: nothing moves as far as anybody can see, and whoever allocated
them need not know. Linux since 6.1 does it at once (MADV_COLLAPSE); an older one may do it later, by itself.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Iterable

import torch

logger = logging.getLogger(__name__)

SIZE = 2 << 20
_MADV_HUGEPAGE, _MADV_COLLAPSE = 14, 25


def back(tensors: Iterable[torch.Tensor]) -> tuple[int, int]:
    """Ask for huge pages under ``tensors``; (bytes that now have them, bytes asked for), whole pages of 2 MiB.

    A page that also holds somebody else's memory is asked for as well, and refused where that memory is of another
    kind (a file, another mapping). Never fails: without huge pages the same forward takes longer.
    """
    pages: set[int] = set()
    for tensor in tensors:
        storage = tensor.untyped_storage()
        begin, end = storage.data_ptr(), storage.data_ptr() + storage.nbytes()
        pages.update(range(begin // SIZE, -(-end // SIZE)))
    madvise, backed = _madvise(), 0
    if madvise is None:
        return 0, len(pages) * SIZE
    for page in sorted(pages):
        address = ctypes.c_void_p(page * SIZE)
        madvise(address, SIZE, _MADV_HUGEPAGE)  # what is touched later gets them too
        backed += madvise(address, SIZE, _MADV_COLLAPSE) == 0
    return backed * SIZE, len(pages) * SIZE


def _madvise() -> ctypes._NamedFuncPointer | None:
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


_said: dict[str, tuple[int, int]] = {}


def back_and_say(what: str, tensors: Iterable[torch.Tensor]) -> None:
    """`back`, with a line in the log where the figures are new: decoders are remade at every change of the policy."""
    found = back(tensors)
    if _said.get(what) != found:
        _said[what] = found
        logger.info("sglang-er: huge pages behind %.2f of %.2f GB of %s", found[0] / 1e9, found[1] / 1e9, what)
