"""The servers of the check, one at a time, and the flags that each is started with."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.server import Server, running_server

from .sections import Options, Skip

# Prompts of 16k and their responses; the made models state less, which their config is told.
CONTEXT = 20480
RUNNING = 128


@dataclass(frozen=True)
class Model:
    """A made model. `kappa` sets the acceptance of big shapes without a search; the check measures what it gives."""

    shape: str
    arch: str
    dtype: str
    kappa: float | None = None
    context: int | None = None


MODELS = {
    "flat fp32": Model("flat", "qwen3", "float32"),
    "flat bf16": Model("flat", "qwen3", "bfloat16"),
    "1.5b": Model("1.5b", "qwen2", "bfloat16", kappa=2.6, context=CONTEXT),
    "7b": Model("7b", "qwen2", "bfloat16", kappa=1.9, context=CONTEXT),
}

# What the check is about: our own kernels and graphs, which a server has to be asked for until they are proven.
OURS = ("--er-kernels", "cuda,triton,reference", "--er-draft-graphs")
# Attention in fp32 as fp32: Triton's products would be tf32, in plain decode and in verify passes differently.
IEEE = {"TRITON_F32_DEFAULT": "ieee"}
# On a GPU: the backends that need the fewest other packages.
GPU_FLAGS = ("--device", "cuda", "--sampling-backend", "pytorch")
TRITON = "triton"
# What another attention backend of the target needs; a machine without network may lack it.
NEEDS = {"fa3": "sgl_kernel.flash_ops", "flashinfer": "flashinfer"}
SMALL_FLAGS = ("--context-length", "512", "--max-total-tokens", "16384", "--random-seed", "1")
# The rest of the memory is for the twin, the KV shadow and the graphs.
BIG_FLAGS = (
    *(
        "--context-length",
        str(CONTEXT),
        "--max-running-requests",
        str(RUNNING),
        "--cuda-graph-max-bs-decode",
        str(RUNNING),
    ),
    *("--mem-fraction-static", "0.6"),
)
# The algorithm, the model's own copy as its drafter, the draft lengths of `fixed:3`.
STANDALONE_FLAGS = (
    *("--speculative-algorithm", "STANDALONE", "--speculative-num-steps", "3", "--speculative-eagle-topk", "1"),
    *("--speculative-num-draft-tokens", "4", "--speculative-draft-model-path", "MODEL"),
)
HUMMING = {"SGLANG_HUMMING_ONLINE_QUANT_CONFIG": json.dumps({"dtype": "int4", "group_size": 128})}


@dataclass(frozen=True)
class Kind:
    """How a server is started; `MODEL` among the flags is the model's folder. `eager`: without CUDA graphs unless
    `--cuda-graph` asks for them. `attention`: the target's backend on a GPU."""

    model: str
    flags: tuple[str, ...]
    eager: bool = False
    env: dict[str, str] = field(default_factory=dict)
    attention: str = TRITON

    @property
    def ours(self) -> bool:
        """Whether the server drafts as we do."""
        return not {"--plain", "--speculative-algorithm"} & set(self.flags)


BF16_FLAGS = ("--dtype", "bfloat16", *SMALL_FLAGS, "--enable-deterministic-inference")

KINDS = {
    "fp32": Kind(
        "flat fp32", ("--dtype", "float32", *SMALL_FLAGS, "--enable-deterministic-inference"), eager=True, env=IEEE
    ),
    "bf16": Kind("flat bf16", BF16_FLAGS, eager=True),
    "bf16 fa3": Kind("flat bf16", BF16_FLAGS, eager=True, attention="fa3"),
    "bf16 flashinfer": Kind("flat bf16", BF16_FLAGS, eager=True, attention="flashinfer"),
    "fp32 saver": Kind(
        "flat fp32",
        (
            *("--dtype", "float32", *SMALL_FLAGS, "--enable-memory-saver", "--enable-weights-cpu-backup"),
            "--disable-prefill-cuda-graph",
        ),
        eager=True,
        env={"SGLANG_MEMORY_SAVER_CUDA_GRAPH": "true", **IEEE},
    ),
    "1.5b": Kind("1.5b", BIG_FLAGS),
    "7b": Kind("7b", BIG_FLAGS),
    "7b fa3": Kind("7b", BIG_FLAGS, attention="fa3"),
    "7b flashinfer": Kind("7b", BIG_FLAGS, attention="flashinfer"),
    "7b plain": Kind("7b", ("--plain", *BIG_FLAGS)),
    "7b plain fa3": Kind("7b", ("--plain", *BIG_FLAGS), attention="fa3"),
    "7b plain flashinfer": Kind("7b", ("--plain", *BIG_FLAGS), attention="flashinfer"),
    "7b ngram": Kind("7b", ("--speculative-algorithm", "NGRAM", "--speculative-num-draft-tokens", "4", *BIG_FLAGS)),
    "7b standalone humming": Kind(
        "7b", (*STANDALONE_FLAGS, "--speculative-draft-model-quantization", "humming", *BIG_FLAGS), env=HUMMING
    ),
    "7b standalone fp8": Kind("7b", (*STANDALONE_FLAGS, "--speculative-draft-model-quantization", "fp8", *BIG_FLAGS)),
}
# What stands for all of them on a CPU: one server, deterministic, of a size that takes seconds.
DRY = KINDS["fp32"]


def flags_of(kind: Kind, options: Options, model: Path) -> list[str]:
    flags = [str(model) if flag == "MODEL" else flag for flag in kind.flags]
    if not options.dry_run:
        flags += [*GPU_FLAGS, "--attention-backend", kind.attention]
        eager = options.eager or (kind.eager and not options.cuda_graph)
        if eager:
            flags += ["--disable-cuda-graph"]
        if kind.ours:
            flags += [*OURS, "eager" if eager else "on"]
    return flags


class Servers:
    """`get` starts a server and stops the one before, if that was another."""

    def __init__(self, options: Options) -> None:
        self._options = options
        self._stack = ExitStack()
        self._kind: Kind | None = None
        self._server: Server | None = None
        self._seconds: float | None = None  # that a cell may take, while one is watched
        self._timer = threading.Timer(0, self._kill)
        # A server that did not start is not tried again for the next cell.
        self._failed: dict[str, str] = {}
        if options.url is not None:
            self._server = Server(options.url, Path(os.devnull), None)  # type: ignore[arg-type]

    def get(self, name: str) -> Server:
        """The server of this kind (`KINDS`). Raises Skip where it failed to start before, or lacks a package."""
        kind = DRY if self._options.dry_run else KINDS[name]
        if lacking := _lacks(kind):
            raise Skip(f"there is no {lacking} here, which {kind.attention} needs")
        if self._options.url is not None or (self._running() and kind == self._kind):
            assert self._server is not None
            return self._server
        self.stop()
        if name in self._failed:
            raise Skip(f"this server did not start: {self._failed[name]}")
        model = made(MODELS[kind.model])
        log = self._options.out / f"server-{name.replace(' ', '-')}.log"
        print(f"starting the server {name}: {' '.join(flags_of(kind, self._options, model))}", flush=True)
        starting = running_server(model, log, *flags_of(kind, self._options, model), env=kind.env)
        self._timer.cancel()
        try:
            self._server = self._stack.enter_context(starting)
        except AssertionError as error:
            self._failed[name] = str(error).splitlines()[-1]
            raise
        self._kind = kind
        self._wind()
        return self._server

    @contextmanager
    def watched(self, seconds: float) -> Iterator[None]:
        """A server that was started here is killed when the block takes longer, its start not counted: its requests
        then fail."""
        self._seconds = seconds
        self._wind()
        try:
            yield
        finally:
            self._timer.cancel()
            self._seconds = None

    def _wind(self) -> None:
        self._timer.cancel()
        if self._seconds is not None:
            self._timer = threading.Timer(self._seconds, self._kill)
            self._timer.daemon = True
            self._timer.start()

    def stop(self) -> None:
        """The log stays where something went wrong."""
        log = self._server.log if self._options.url is None and self._server is not None and self._running() else None
        self._stack.close()
        if log is not None:
            log.unlink(missing_ok=True)
        if self._options.url is None:
            self._server = self._kind = None

    def _running(self) -> bool:
        return self._server is not None and self._server.process.poll() is None

    def _kill(self) -> None:
        if self._options.url is None and self._running():
            assert self._server is not None
            with suppress(ProcessLookupError):
                os.killpg(self._server.process.pid, signal.SIGKILL)


def _lacks(kind: Kind) -> str | None:
    """A module that the kind's attention needs and that is not installed."""
    module = NEEDS.get(kind.attention)
    try:
        return None if module is None or importlib.util.find_spec(module) else module
    except ImportError:  # of the package that it is in
        return module


def made(model: Model) -> Path:
    """Its folder in the user's cache; made at first use."""
    from sglang_er.cli.common import cache_dir, models_hash
    from sglang_er.models.make import make_model

    name = "-".join(str(value) for value in (model.arch, model.shape, model.dtype, model.kappa) if value is not None)
    folder = cache_dir() / "gpu-check" / f"{name}-{models_hash()}"
    config = folder / "config.json"
    if not config.is_file():
        make_model(model.shape, model.arch, folder, dtype=model.dtype, kappa=model.kappa)
    if model.context is not None:
        # Positions are rotations: the model takes any number of them, with whatever acceptance that gives.
        content: dict[str, Any] = json.loads(config.read_text(encoding="utf-8"))
        content["max_position_embeddings"] = model.context
        config.write_text(json.dumps(content, indent=1), encoding="utf-8")
    return folder
