"""A server under examination: what it says about itself, its weights, and the way back to how it was found."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang_er.rollout.bench import switchable
from sglang_er.rollout.conformance import bodies, replies
from sglang_er.rollout.conformance.check import Broken, NotHere, expect
from sglang_er.rollout.conformance.connection import Connection
from sglang_er.rollout.conformance.sender import Sender
from sglang_er.rollout.errors import RolloutError

# A draft length that changes every step, plain decode included: every way in which a step can end is taken.
SCHEDULE = (0, 3, 1, 7, 5, 2)
# The draft length while acceptance is measured.
GAMMA = 5
LONG = 800
MEASURED_PROMPTS, MEASURED_TOKENS = 6, 48


@dataclass(frozen=True)
class Options:
    """`weights`: another checkpoint of the server's architecture, and the server's own; both as the server finds them.

    `sender`: what trainers send tensors with, or why it cannot be had. `destructive`: end the server if it breaks.
    """

    weights: Sequence[str] = ()
    destructive: bool = False
    sender: Sender | None = None
    no_sender: str = "no sender was given"


@dataclass(frozen=True)
class Measured:
    """Greedy answers one at a time and the accept length while they were made (None: the server does not speculate)."""

    ids: list[list[int]]
    accept_length: float | None


class Session(Connection):
    """All that the checks share. Every failure of the server's own is a Broken or a RolloutError."""

    def __init__(self, url: str, options: Options | None = None) -> None:
        super().__init__(url)
        self.options = options or Options()
        self.info: dict[str, Any] = self.get("/server_info")
        self.model: dict[str, Any] = self.get("/model_info")
        state = self.send("GET", "/er/state")
        self.ours = state.status_code == 200
        self._policy = switchable(state.json()["engines"][0]) if self.ours else {}
        given = self.options.weights
        self.own_weights = given[1] if len(given) > 1 else str(self.model["model_path"])
        self._version = str(self.model["weight_version"])
        self._own: Measured | None = None
        self._changed = self._paused = False

    @property
    def tolerance(self) -> float:
        """Between logprobs of one token computed by decoding and by scoring, in nats."""
        return 2e-3 if "float32" in str(self.info.get("dtype")) else 0.3

    @property
    def long(self) -> int:
        """Tokens of a response that outlasts a few calls; the prompt of `prompt()` fits before it."""
        context = self.info.get("context_length") or self.info.get("max_req_input_len") or LONG + 64
        return min(LONG, int(context) - 64)

    def gamma_max(self) -> int:
        """The longest draft: tokens a step may commit beyond one."""
        return int(self.info.get("speculative_num_draft_tokens") or 1) - 1

    def speculates(self) -> bool:
        return bool(self.info.get("speculative_algorithm"))

    def counters(self) -> Mapping[str, Any] | None:
        """Step counters of the first engine; None for a server that is not ours."""
        steps: Mapping[str, Any] | None = self.client.state()["steps"] if self.ours else None
        return steps

    # Policy: only a server of ours can be told how to draft

    def draft(self, gamma: int | None = None) -> None:
        """Drafts of `gamma` tokens, 0 for none; None: a length that changes every step."""
        if not self.ours:
            return
        most = self.gamma_max()
        schedule = [min(length, most) for length in SCHEDULE]
        chosen = (
            {"policy": "cycle", "gamma_schedule": schedule} if gamma is None else {"policy": "fixed", "gamma": gamma}
        )
        self.client.set_policy(chosen)

    # Pause

    @contextmanager
    def paused(self, **mode: str) -> Iterator[None]:
        """Between pause_generation and continue_generation, as every trainer does it."""
        self._paused = True
        self.post("/pause_generation", mode)
        yield
        self.resume()

    def resume(self) -> None:
        self.post("/continue_generation")
        self._paused = False

    # Weights

    def other_weights(self) -> str:
        """The other checkpoint. Raises NotHere without one."""
        if not self.options.weights:
            raise NotHere("changes the weights: name another checkpoint of this architecture with --weights DIR")
        return self.options.weights[0]

    def load(self, path: str, version: str, **fields: Any) -> None:
        """update_weights_from_disk, as slime sends it."""
        self.touch()
        body = {"model_path": path, "weight_version": version, **fields}
        reply = self.post("/update_weights_from_disk", body)
        expect(reply.get("success") is True, "contract", f"/update_weights_from_disk: {reply}")

    def touch(self) -> None:
        """The weights are no longer the server's own: `restore` loads them. Measures them first, if nobody has."""
        self.measure_own()
        self._changed = True

    def measure_own(self) -> Measured:
        """The server's own weights as they were before any check changed them."""
        if self._own is None:
            self._own = self.measure()
        return self._own

    def measure(self) -> Measured:
        """The weights loaded now; requests one at a time, so that nothing but the weights decides the accepts."""
        self.wait_idle()
        self.draft(min(GAMMA, self.gamma_max()))
        self.flush()
        got = [self.generate(bodies.greedy(self.prompt(900 + i, 20), MEASURED_TOKENS)) for i in range(MEASURED_PROMPTS)]
        self.draft()
        return Measured([replies.output_ids(reply) for reply in got], replies.accept_length(got))

    # The way back

    def restore(self) -> None:
        """Running, idle, on its own weights and version, with its own policy. Raises RolloutError if it cannot be."""
        try:
            if self._paused:
                self.resume()
            self.send("POST", "/abort_request", {"abort_all": True})
            self.wait_idle()
            if self._changed:
                self.send("POST", "/end_weight_update", {})  # 400 where no session is open
                self.load(self.own_weights, self._version)
                self._changed = False
            if self.ours:
                self.client.set_policy(self._policy)
        except Broken as error:
            raise RolloutError(f"the server could not be brought back to how it was found: {error}") from error

    def local_weights(self, path: str) -> Path:
        """A checkpoint's files, for tensors that this program sends. Raises NotHere where they are elsewhere."""
        if not (folder := Path(path)).is_dir():
            raise NotHere(f"{path} is not a folder on this machine: its tensors cannot be sent")
        return folder

    def sender(self) -> Sender:
        """What trainers send tensors with. Raises NotHere where it cannot be had or the server is elsewhere."""
        if self.options.sender is None:
            raise NotHere(self.options.no_sender)
        if "://127.0.0.1" not in self.url and "://localhost" not in self.url:
            raise NotHere("tensors travel through this machine's shared memory: use --url http://127.0.0.1:PORT")
        return self.options.sender
