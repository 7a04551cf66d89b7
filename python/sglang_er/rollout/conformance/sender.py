"""What a trainer sends weights with. The real ones are SGLang's own, which only `engine/` may import: see
`engine/weight_sender.py`, which the command hands to the suite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

NamedTensors = Sequence[tuple[str, "torch.Tensor"]]
BUCKET_BYTES = 512 << 20


class Sender(Protocol):
    """SGLang's serializer and process groups."""

    def bucket(self, tensors: NamedTensors) -> str:
        """One flattened bucket (none of `tensors` is legal), for `serialized_named_tensors`.

        Its memory is shared: keep the sender until the server has answered.
        """

    def group(self, name: str, port: int) -> Any:
        """Rank 0 of a gloo group of two on this machine; blocks until the server has joined."""

    def broadcast(self, group: Any, tensors: NamedTensors) -> None:
        """All of them from rank 0, in order."""

    def leave(self, group: Any) -> None:
        """Destroy the group on this side."""


def tensors_of(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Name and tensor of everything in a checkpoint, file by file."""
    from safetensors.torch import load_file

    for path in sorted(folder.glob("*.safetensors")):
        yield from load_file(path).items()


def buckets_of(folder: Path, at_least: int = 2, limit: int = BUCKET_BYTES) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """A checkpoint in buckets of at most `limit` bytes (a larger tensor alone), `at_least` of them."""
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    limit = min(limit, max(1, total // at_least))
    bucket: list[tuple[str, torch.Tensor]] = []
    size = 0
    for name, tensor in tensors_of(folder):
        if bucket and size + tensor.nbytes > limit:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket


def described(tensors: NamedTensors) -> Mapping[str, list[Any]]:
    """Names, dtypes and shapes as update_weights_from_distributed takes them."""
    return {
        "names": [name for name, _ in tensors],
        "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in tensors],
        "shapes": [list(tensor.shape) for _, tensor in tensors],
    }
