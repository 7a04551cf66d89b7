"""What an adapter answers. The rest of engine/ uses only what all supported versions have alike, and asks for the rest.

An adapter imports SGLang inside its methods: it can be looked at where another version is installed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, ClassVar, Protocol

import torch


class WeightWatch(Protocol):
    """Tells of every write of the policy's weights; `session_open`: between a trainer's begin and its end."""

    session_open: bool


class Adapter(ABC):
    """Names of SGLang's functions are dotted paths, as SGLang's HookRegistry takes them."""

    versions: ClassVar[tuple[str, ...]]
    # Everything private that is relied on: "module:attribute.path". Checked at start-up.
    required: ClassVar[tuple[str, ...]]

    # -- where SGLang keeps what is hooked -----------------------------------------------------------------------

    row_headroom: ClassVar[str]  # slots that a row of the slot table has behind the context's end
    write_slots: ClassVar[str]  # assign_req_to_token_pool of engine/cpu/patches.py
    last_slot: ClassVar[str]  # get_last_loc
    seeded_hash: ClassVar[str]  # murmur_hash32
    bind_threads: ClassVar[str | None]  # init_threads_binding; None where data parallelism needs no help

    @abstractmethod
    def register_hooks(self) -> None:
        """What only this version needs."""

    @abstractmethod
    def register_cpu_hooks(self) -> None:
        """What only this version needs on our CPU platform."""

    # -- arguments and configuration -----------------------------------------------------------------------------

    @abstractmethod
    def resolve(self, server_args: Any) -> None:
        """Parsed arguments -> checked and complete ones; raises what SGLang and our validator raise."""

    @abstractmethod
    def model_config(self, server_args: Any) -> Any:
        """The ModelConfig, from what `validate_server_args` of an algorithm is given."""

    @abstractmethod
    def has_recurrent_layers(self, model_config: Any) -> bool:
        """Whether SGLang keeps a state per request beside the KV cache."""

    @abstractmethod
    def served_algorithm(self) -> str | None:
        """--speculative-algorithm of the server that this process belongs to."""

    @abstractmethod
    def deterministic(self) -> bool:
        """--enable-deterministic-inference of the server that this process belongs to."""

    @abstractmethod
    def weight_version(self, tokenizer_manager: Any) -> Any:
        """The version that the last update named, in the HTTP process."""

    @abstractmethod
    def allow_attention_backend(self, name: str) -> None:
        """Put a backend's name on SGLang's lists of known and of deterministic ones; again does nothing."""

    @abstractmethod
    def row_reserve(self) -> int:
        """Slots that SGLang may write behind a request's last committed position."""

    @abstractmethod
    def ranks(self, runner: Any) -> tuple[int, int | None]:
        """(tensor-parallel rank, data-parallel rank or None) of a model runner."""

    def tensor_parallel_groups(self) -> tuple[Any, Any]:
        """Process groups of the ranks that share every layer: the CPU's and the device's."""
        from sglang.srt.distributed import get_tp_group

        group = get_tp_group()
        return group.cpu_group, group.device_group

    @abstractmethod
    def shards(self, linear: Any) -> int:
        """How many ranks hold a part of a LinearBase's weight."""

    @abstractmethod
    def request_limits(self) -> tuple[int | None, int | None]:
        """(--max-running-requests, --max-total-tokens), None where SGLang finds them itself."""

    # -- memory that a trainer may take back: alike in all versions ----------------------------------------------

    def memory_saver(self, runner: Any) -> Any:
        """The runner's TorchMemorySaverAdapter: one that does nothing without --enable-memory-saver."""
        return runner.memory_saver_adapter

    def saves_graphs(self) -> bool:
        """Whether SGLang keeps the memory of CUDA graphs under the tag cuda_graph, if there is a memory saver."""
        from sglang.srt.environ import envs

        return bool(envs.SGLANG_MEMORY_SAVER_CUDA_GRAPH.get())

    # -- steps ---------------------------------------------------------------------------------------------------

    @abstractmethod
    def spec_input_types(self) -> tuple[Any, Any]:
        """Members of SGLang's closed SpecInputType that the carried state and the verify pass borrow."""

    @abstractmethod
    def verify_width(self, runner: Any, width: int) -> AbstractContextManager[None]:
        """Within it, an attention backend that is made is one for verify passes of `width` tokens a request."""

    @abstractmethod
    def forget_read_event(self, runner: Any) -> None:
        """A draft forward must not count as the step's last read of the slot table."""

    @abstractmethod
    def compute_logprobs(self, batch: Any, output: Any, tokens: torch.Tensor, width: int) -> None:
        """Logprobs of `tokens` flat [B * width] from the rows of output.next_token_logits, into `output`."""

    # -- CUDA graphs ---------------------------------------------------------------------------------------------

    records_graphs: ClassVar[bool]  # `engine/cuda` knows this version's graph runners

    @abstractmethod
    def decode_graphs(self) -> list[int]:
        """Batch sizes whose decode steps this server records; none without CUDA graphs."""

    # -- weight updates ------------------------------------------------------------------------------------------

    has_sessions: ClassVar[bool]  # begin_weight_update and end_weight_update exist
    has_auxiliary_output: ClassVar[bool]  # outputs of a step beside its tokens (provenance)

    @abstractmethod
    def worker_base(self) -> type:
        """Base class of the worker: SGLang's, with what this version asks of a worker besides."""

    @abstractmethod
    def watch_weights(self, runner: Any, changed: Callable[[], None]) -> WeightWatch:
        """`changed()` after every call that writes the policy's weights, whichever way it came and however it ended."""

    @abstractmethod
    def is_idle(self, updater: Any) -> bool:
        """Whether SGLang could flush its cache now; `updater`: SchedulerWeightUpdaterManager."""

    def settle(self, updater: Any) -> None:  # noqa: B027
        """Brings to its end what the scheduler still holds of requests that are finished, if there are no others. With
        overlap a step more is under way when a request's last token is sent; who updates on that is not to be told that
        requests are running. Nothing where a version has no such thing here."""

    @abstractmethod
    def state_request_done(self, updated: bool) -> Any:
        """Reply to a command that travelled in a SetInternalStateReq."""
