"""The one configuration: what can be set, where from, and which setting wins.

defaults < file < environment (`SGLANG_ER_*`) < flags (`--er-*`). SGLang's own ServerArgs is closed, so `serve` resolves
the configuration once and hands it to the processes that SGLang spawns through the environment (`to_env`), where they
read it back (`from_env`). Everything wrong is a ConfigError with one line per mistake that says what to do.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin

from pydantic import ConfigDict, Field, PrivateAttr, ValidationError, ValidationInfo, field_validator

from sglang_er.config_messages import FORMS, explain, nearest
from sglang_er.config_sync import SYNC_SWITCHABLE, SyncOptions

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ENV_PREFIX = "SGLANG_ER_"
FLAG_PREFIX = "--er-"
MAX_GAMMA = 16
DEFAULT_GAMMA = 3
# Where a small Xeon (2 cores, AVX-512) gains: with more than eight requests a step is arithmetic, not memory traffic,
# and drafted tokens cost as much as they bring. docs/decisions.md has the measurement.
DEFAULT_THRESHOLDS = ((1, 5), (2, 4), (4, 2), (8, 1))

# What can change while a server lives: nothing was built from it.
SWITCHABLE = SYNC_SWITCHABLE | frozenset(
    {"policy", "objective", "early_stop", "gamma", "thresholds", "gamma_schedule"}
    | {"executor", "draft_activations", "kv_shadow", "kv_shadow_from", "draft_graphs"}
)

# Variables with our prefix that are no options (docs/configuration.md); any other unknown one is an error.
ENV_FILE = "SGLANG_ER_CONFIG"
ENV_SET_BY = "SGLANG_ER_SET_BY"
_NOT_OPTIONS = frozenset({ENV_FILE, ENV_SET_BY}) | {
    f"SGLANG_ER_{name}" for name in ("CPU_ISA", "TEST_HOOK", "CUDA_KERNELS", "SHIP_CUDA_KERNELS")
}

Source = Literal["default", "file", "environment", "flag", "admin"]
_NOTHING: Mapping[str, Any] = MappingProxyType({})


class ConfigError(ValueError):
    """The configuration cannot be used; the message has one line per mistake."""


# Defaults follow a lower gamma_max by themselves; only what somebody set can contradict it.
def _default_gamma(data: dict[str, Any]) -> int:
    return min(DEFAULT_GAMMA, int(data["gamma_max"]))


def _default_thresholds(data: dict[str, Any]) -> tuple[tuple[int, int], ...]:
    return tuple((batch_size, min(gamma, data["gamma_max"])) for batch_size, gamma in DEFAULT_THRESHOLDS)


def _check_gammas(gammas: Iterable[int], info: ValidationInfo) -> None:
    gamma_max = info.data.get("gamma_max", MAX_GAMMA)  # absent if it is wrong itself
    for gamma in gammas:
        if not 0 <= gamma <= gamma_max:
            raise ValueError(f"{gamma} is outside 0..gamma_max: choose at most {gamma_max}, or raise gamma_max")


class RolloutConfig(SyncOptions):
    """Resolved and validated; immutable. Get one from `resolve` or `from_env`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    policy: Literal["goodput", "threshold", "fixed", "cycle"] = Field(
        "goodput",
        description="how the draft length is chosen: from measured cost and acceptance; by batch size; always gamma; "
        "or gamma_schedule step by step",
    )
    objective: Literal["tokens", "makespan"] = Field(
        "tokens", description="what policy goodput maximizes: tokens per second, or those of the slowest requests"
    )
    early_stop: bool = Field(
        True,
        description="whether policy goodput ends a draft, or carries it on, by the twin's confidence (on a CPU)",
    )
    gamma_max: int = Field(
        7, ge=1, le=MAX_GAMMA, description="most tokens drafted per request and step; KV slots are reserved for it"
    )
    gamma: int = Field(
        default_factory=_default_gamma,
        ge=0,
        le=MAX_GAMMA,
        description="draft length of policy fixed; 0 is plain decode",
    )
    thresholds: tuple[tuple[int, int], ...] = Field(
        default_factory=_default_thresholds,
        description="draft lengths of policy threshold: largest-batch:gamma, rising; above the last, plain decode",
    )
    gamma_schedule: tuple[int, ...] | None = Field(
        None, validate_default=True, description="draft lengths of policy cycle, one per step, over and over"
    )
    seed_seconds: float = Field(
        3.0,
        ge=0.0,
        le=60.0,
        description="time for forwards at start-up that tell policy goodput what steps cost; 0 for none",
    )
    cost_file: str | None = Field(
        None,
        description="file of `sglang-er calibrate` with the costs of this machine and model, in place of the timing",
    )
    group_size: int = Field(
        128, ge=32, le=1024, multiple_of=32, description="inputs of a linear layer that share one 4-bit scale"
    )
    clip_search: bool = Field(
        False, description="search, for every 4-bit scale, the range of weights that loses least, outliers cut off"
    )
    quantize_lm_head: bool = Field(True, description="use a 4-bit lm_head in the draft pass as well")
    cpu_threads: int | None = Field(
        None,
        ge=1,
        le=1024,
        description="threads for the arithmetic on a CPU; without it, serve takes the physical cores that it may use",
    )
    kernels: str = Field(
        "auto",
        pattern=r"^(auto|(cpu|cuda|triton|marlin|reference)(,(cpu|cuda|triton|marlin|reference))*)$",
        description="who computes: auto, for the fastest kernels of this machine, or names in the order of preference: "
        "cpu, cuda, triton, marlin, SGLang's W4A16 kernel on weights in its own layout, and reference, the plain torch "
        "ones that the others are tested against",
    )
    kernel_table: str = Field(
        "auto",
        min_length=1,
        description="measured times by which kernels of the draft side are chosen by size on a GPU: auto, for the "
        "table that came with the package, off, or a file of `sglang-er kernel-table`",
    )

    executor: Literal["native", "wrapped"] = Field(
        "native",
        description="who runs decode, verify and draft forwards on a CPU: one compiled call for Llama-like models, or "
        "SGLang's model code",
    )
    draft_activations: Literal["int8", "exact"] = Field(
        "int8",
        description="activations in the draft pass: rounded to 8 bits where that is faster, which is always so on a "
        "CPU and for large batches on a GPU, or as they are",
    )

    draft_graphs: Literal["auto", "on", "off", "eager"] = Field(
        "auto",
        description="whole draft passes as CUDA graphs; auto: on GPUs, once seen correct on one; eager: the same "
        "without recording, also on a CPU with executor wrapped, for tests",
    )
    graph_memory_mb: int = Field(
        2048,
        ge=0,
        description="memory for CUDA graphs of draft and of verify passes, each; beyond it passes run unrecorded",
    )
    graph_seconds: float = Field(
        30.0, ge=0.0, description="time at start-up for recording verify passes, and as much for draft passes"
    )

    kv_shadow: Literal["auto", "off", "int8", "int4", "fp8"] = Field(
        "auto",
        description="quantized copy of the KV cache that the draft pass reads; auto: int4 on a CPU",
    )
    kv_shadow_from: int = Field(
        4096, ge=0, description="tokens of context in the whole batch from which on the draft pass reads the KV shadow"
    )

    _set_by: dict[str, Source] = PrivateAttr(default_factory=dict)

    @field_validator("thresholds", "gamma_schedule", mode="before")
    @classmethod
    def _from_text(cls, value: object, info: ValidationInfo) -> object:
        """Environment and flags are text: `1:5,4:3` and `0,3,1`."""
        if not isinstance(value, str):
            return value
        parts = [part.strip() for part in value.split(",")]
        if info.field_name == "gamma_schedule":
            return parts
        pairs = [part.split(":") for part in parts]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(FORMS["thresholds"])
        return pairs

    @field_validator("gamma_max", "gamma", "group_size", "cpu_threads", "kv_shadow_from", mode="before")
    @classmethod
    def _no_truth_values(cls, value: object) -> object:
        if isinstance(value, bool):
            raise ValueError("give a whole number")
        return value

    @field_validator("gamma")
    @classmethod
    def _gamma_within_max(cls, value: int, info: ValidationInfo) -> int:
        _check_gammas([value], info)
        return value

    @field_validator("kernels")
    @classmethod
    def _marlin_without_clip_search(cls, value: str, info: ValidationInfo) -> str:
        if info.data.get("clip_search") and "marlin" in value.split(","):
            raise ValueError("with clip_search choose names without marlin, whose layout has none")
        return value

    @field_validator("thresholds")
    @classmethod
    def _thresholds_rise(cls, value: tuple[tuple[int, int], ...], info: ValidationInfo) -> tuple[tuple[int, int], ...]:
        sizes = [batch_size for batch_size, _ in value]
        if not sizes or sizes[0] < 1 or any(low >= high for low, high in pairwise(sizes)):
            raise ValueError(FORMS["thresholds"])
        _check_gammas((gamma for _, gamma in value), info)
        return value

    @field_validator("gamma_schedule")
    @classmethod
    def _schedule_where_needed(cls, value: tuple[int, ...] | None, info: ValidationInfo) -> tuple[int, ...] | None:
        if not value:
            if value is not None or info.data.get("policy") == "cycle":
                raise ValueError(f"{FORMS['gamma_schedule']} (policy cycle needs at least one)")
            return None
        _check_gammas(value, info)
        return value

    @property
    def own_kernels(self) -> bool:
        """Whether a CPU's compiled kernels may be used beyond the registry, which looks at `kernels` itself;
        Marlin only packs there and does not count."""
        return next((name for name in self.kernels.split(",") if name != "marlin"), "") in ("auto", "cpu")

    def set_by(self) -> dict[str, Source]:
        """Which layer each field's value comes from."""
        return {name: self._set_by.get(name, "default") for name in type(self).model_fields}

    def describe(self) -> dict[str, Any]:
        """Values and where they come from, as JSON takes them, for /server_info."""
        return {"values": self.model_dump(mode="json"), "set_by": self.set_by()}

    def changed(self, changes: Mapping[str, Any]) -> RolloutConfig:
        """The configuration of a live server after an administrator's changes, validated as a whole."""
        if frozen := [name for name in changes if name in type(self).model_fields and name not in SWITCHABLE]:
            lines = [f"{name}: fixed at start; restart the server with {flag_of(name)}" for name in frozen]
            raise ConfigError("\n".join(lines))
        return extended(self, "admin", changes)


class _Layers:
    """Values merged so far, who set them, under which name (for error lines), and the mistakes met."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.set_by: dict[str, Source] = {}
        self.labels: dict[str, str] = {}
        self.mistakes: list[str] = []

    def add(self, source: Source, values: Mapping[str, Any], labels: Mapping[str, str]) -> None:
        for name, value in values.items():
            if name in RolloutConfig.model_fields:
                self.values[name], self.set_by[name], self.labels[name] = value, source, labels[name]
            else:
                self.mistakes.append(f"{labels[name]}: unknown option{nearest(name, RolloutConfig.model_fields)}")

    def build(self) -> RolloutConfig:
        config = None
        try:
            config = RolloutConfig(**self.values)
        except ValidationError as error:
            for mistake in error.errors():
                if mistake["type"] == "default_factory_not_called":
                    continue  # a consequence of another mistake
                name = str(mistake["loc"][0])
                self.mistakes.append(
                    f"{self.labels.get(name, name)}: {explain(name, RolloutConfig.model_fields[name], mistake)}"
                )
        if config is None or self.mistakes:
            raise ConfigError("\n".join(self.mistakes))
        config._set_by.update(self.set_by)
        return config


def _read_file(path: Path) -> dict[str, Any]:
    parse = {".toml": tomllib.loads, ".json": json.loads}.get(path.suffix.lower())
    if parse is None:
        raise ConfigError(f"{path}: configuration files are .toml or .json")
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot read the configuration file: {error.strerror}") from None
    except ValueError as error:  # both parsers, and the decoding
        raise ConfigError(f"{path}: not valid {path.suffix[1:].upper()}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: must hold one table of options, not a {type(values).__name__}")
    return values


def resolve(
    file: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] = MappingProxyType({}),
    flags: Mapping[str, Any] = _NOTHING,
) -> RolloutConfig:
    """Merge the layers. `file` overrides the one that the environment names; `flags` are field names and values."""
    layers = _Layers()
    path = Path(file) if file is not None else Path(env[ENV_FILE]) if env.get(ENV_FILE) else None
    if path is not None:
        values = _read_file(path)
        layers.add("file", values, {name: f"{path}, {name}" for name in values})
    names = {name: name[len(ENV_PREFIX) :].lower() for name in env if name.startswith(ENV_PREFIX)}
    options = {name: field for name, field in names.items() if name not in _NOT_OPTIONS}
    layers.add("environment", {f: env[n] for n, f in options.items()}, {f: n for n, f in options.items()})
    layers.add("flag", flags, {name: flag_of(name) for name in flags})
    config = layers.build()
    # Processes that serve spawned: say who set a value at first, not that it came through the environment.
    handed = json.loads(env.get(ENV_SET_BY, "{}"))
    config._set_by.update(
        {name: source for name, source in handed.items() if config._set_by.get(name) == "environment"}
    )
    return config


def to_env(config: RolloutConfig) -> dict[str, str]:
    """What a child process needs in its environment for `from_env` to give the same configuration.

    The file's values are among them, so the child is told to read no file.
    """
    handed = {f"{ENV_PREFIX}{name.upper()}": _text(getattr(config, name)) for name in sorted(config.model_fields_set)}
    handed = {name: text for name, text in handed.items() if text}
    return {**handed, ENV_FILE: "", ENV_SET_BY: json.dumps(config._set_by)}


def from_env(env: Mapping[str, str] | None = None) -> RolloutConfig:
    """The configuration of this process: what `serve` handed over, or what the user's environment says."""
    return resolve(env=os.environ if env is None else env)


def extended(config: RolloutConfig, source: Source, values: Mapping[str, Any]) -> RolloutConfig:
    """`config` with these values on top, validated as a whole."""
    layers = _Layers()
    layers.values = {name: getattr(config, name) for name in config.model_fields_set if name not in values}
    layers.set_by = {name: config._set_by.get(name, "default") for name in layers.values}
    layers.add(source, values, {name: name for name in values})
    return layers.build()


def _text(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return ",".join(":".join(map(str, item)) if isinstance(item, tuple) else str(item) for item in value)
    return "" if value is None else str(value)


def flag_of(name: str) -> str:
    return FLAG_PREFIX + name.replace("_", "-")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One `--er-<field>` per field. Values stay text here: `resolve` is the one place that judges them."""
    group = parser.add_argument_group("sglang-er options (docs/configuration.md)")
    group.add_argument(f"{FLAG_PREFIX}config", metavar="FILE", help="TOML or JSON file with these options")
    for name, field in RolloutConfig.model_fields.items():
        choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
        shown = _text(getattr(RolloutConfig(), name)) or "none"
        metavar = "|".join(choices) or "VALUE"
        group.add_argument(flag_of(name), metavar=metavar, help=f"{field.description} (default: {shown})")


def from_flags(args: argparse.Namespace, env: Mapping[str, str] | None = None) -> RolloutConfig:
    """The configuration of a command whose parser had `add_flags`."""
    flags = {name: getattr(args, f"er_{name}") for name in RolloutConfig.model_fields}
    given = {name: value for name, value in flags.items() if value is not None}
    return resolve(args.er_config, os.environ if env is None else env, given)
