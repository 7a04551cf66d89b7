"""Layers of the configuration: who wins, who is named, and what reaches a spawned process."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from sglang_er.config import (
    ENV_FILE,
    SWITCHABLE,
    ConfigError,
    RolloutConfig,
    add_flags,
    from_env,
    from_flags,
    resolve,
    to_env,
)
from sglang_er.config_sync import PARTS


def test_each_layer_wins_over_the_one_before(tmp_path: Path):
    file = tmp_path / "er.toml"
    file.write_text("gamma = 1\ngamma_max = 5\ngroup_size = 64\n")
    config = resolve(file, env={"SGLANG_ER_GAMMA": "2", "SGLANG_ER_GROUP_SIZE": "256"}, flags={"gamma": "4"})
    assert (config.gamma, config.group_size, config.gamma_max, config.policy) == (4, 256, 5, "goodput")
    set_by = config.set_by()
    assert [set_by[name] for name in ("gamma", "group_size", "gamma_max", "policy")] == [
        "flag",
        "environment",
        "file",
        "default",
    ]


@pytest.mark.parametrize("suffix", [".json", ".toml"])
def test_files_of_both_kinds_say_the_same(tmp_path: Path, suffix: str):
    text = {
        ".json": json.dumps({"policy": "cycle", "gamma_schedule": [0, 3], "thresholds": [[2, 5], [8, 1]]}),
        ".toml": 'policy = "cycle"\ngamma_schedule = [0, 3]\nthresholds = [[2, 5], [8, 1]]\n',
    }[suffix]
    file = tmp_path / f"er{suffix}"
    file.write_text(text)
    config = resolve(file)
    assert (config.policy, config.gamma_schedule, config.thresholds) == ("cycle", (0, 3), ((2, 5), (8, 1)))


def test_environment_can_name_the_file_and_an_argument_overrides_it(tmp_path: Path):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.write_text('{"gamma": 1}')
    second.write_text('{"group_size": 64}')
    assert resolve(env={ENV_FILE: str(first)}).gamma == 1
    config = resolve(second, env={ENV_FILE: str(first)})
    assert (config.gamma, config.group_size) == (RolloutConfig().gamma, 64)


def test_variables_of_others_are_left_alone():
    assert resolve(env={"SGLANG_PLATFORM": "x", "PATH": "y", "SGLANG_ERX": "z"}) == RolloutConfig()


def test_defaults_follow_a_lower_gamma_max():
    config = resolve(flags={"gamma_max": 2})
    assert config.gamma == 2
    assert max(gamma for _, gamma in config.thresholds) == 2


OPTIONS = {
    "policy": st.sampled_from(["goodput", "fixed", "threshold"]),
    "objective": st.sampled_from(["tokens", "makespan"]),
    "early_stop": st.booleans(),
    "gamma_max": st.integers(8, 16),
    "gamma": st.integers(0, 7),
    "thresholds": st.dictionaries(st.integers(1, 512), st.integers(0, 7), min_size=1).map(
        lambda pairs: tuple(sorted(pairs.items()))
    ),
    "gamma_schedule": st.lists(st.integers(0, 7), min_size=1).map(tuple),
    "seed_seconds": st.floats(0.0, 60.0),
    "cost_file": st.text("abc/._", min_size=1),
    "group_size": st.integers(1, 32).map(lambda n: 32 * n),
    "clip_search": st.booleans(),
    "quantize_lm_head": st.booleans(),
    "requantize": st.booleans(),
    "requantize_on_continue": st.booleans(),
    "weight_check_seconds": st.floats(0.0, 86400.0),
    "check_epochs": st.booleans(),
    "health_drop": st.floats(0.0, 1.0),
    "rl_compat": st.one_of(
        st.just(("none",)),
        st.lists(st.sampled_from(PARTS), min_size=1, unique=True).map(tuple),
    ),
    "provenance": st.sampled_from(["off", "request", "all"]),
    "cpu_threads": st.integers(1, 64),
    "kernels": st.sampled_from(["auto", "reference"]),
    "kernel_table": st.text("abc/._", min_size=1),
    "executor": st.sampled_from(["native", "wrapped"]),
    "kv_shadow": st.sampled_from(["auto", "off", "int8", "int4", "fp8"]),
    "kv_shadow_from": st.integers(0, 100_000),
    "draft_graphs": st.sampled_from(["auto", "on", "off", "eager"]),
    "graph_memory_mb": st.integers(0, 100_000),
    "graph_seconds": st.floats(0.0, 1000.0),
    "draft_activations": st.sampled_from(["int8", "exact"]),
}


@given(st.fixed_dictionaries({}, optional=OPTIONS))
def test_a_spawned_process_reads_back_what_was_handed_over(values: dict[str, object]):
    config = resolve(flags=values)
    handed = from_env(to_env(config))
    assert handed == config
    assert handed.set_by() == config.set_by()


def test_the_way_into_a_spawned_process_is_tested_for_every_field():
    """The property test above draws what OPTIONS lists; a new field must be listed there."""
    assert set(OPTIONS) == set(RolloutConfig.model_fields)


def test_handing_over_replaces_what_the_parent_inherited(tmp_path: Path):
    file = tmp_path / "er.json"
    file.write_text('{"gamma": 1, "group_size": 64}')
    inherited = {ENV_FILE: str(file), "SGLANG_ER_GAMMA": "2"}
    other = tmp_path / "other.json"
    other.write_text('{"gamma_max": 9}')
    config = resolve(other, inherited, {"gamma": 5})
    child = from_env({**inherited, **to_env(config)})
    assert child == config
    assert child.group_size == RolloutConfig().group_size  # the file that lost is not read by the child


def test_from_env_reads_the_process_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SGLANG_ER_GAMMA", "6")
    assert from_env().gamma == 6


def _parse(*argv: str) -> RolloutConfig:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return from_flags(parser.parse_args(argv), env={})


def test_every_field_has_a_flag():
    parser = argparse.ArgumentParser()
    add_flags(parser)
    shown = parser.format_help()
    for name in RolloutConfig.model_fields:
        assert f"--er-{name.replace('_', '-')}" in shown


def test_flags_give_typed_values():
    config = _parse("--er-thresholds", "2:5,8:3", "--er-quantize-lm-head", "false", "--er-policy", "fixed")
    assert config.thresholds == ((2, 5), (8, 3))
    assert config.quantize_lm_head is False
    assert config.set_by()["policy"] == "flag"
    assert config.set_by()["gamma"] == "default"


def test_parts_of_the_rl_compatibility_are_named_or_all_or_none():
    assert _parse().rl_compat == _parse("--er-rl-compat", "all").rl_compat == PARTS
    assert _parse("--er-rl-compat", "sessions, memory").rl_compat == ("sessions", "memory")
    assert _parse("--er-rl-compat", "none").rl_compat == ("none",)


def test_a_flag_can_name_the_file(tmp_path: Path):
    file = tmp_path / "er.toml"
    file.write_text("gamma = 1\n")
    assert _parse("--er-config", str(file)).gamma == 1


def test_a_live_server_switches_policy_and_keeps_the_rest():
    config = resolve(flags={"group_size": 64, "gamma_max": 9})
    switched = config.changed({"policy": "cycle", "gamma_schedule": [0, 9]})
    assert (switched.policy, switched.gamma_schedule) == ("cycle", (0, 9))
    assert (switched.group_size, switched.gamma_max) == (64, 9)
    assert switched.set_by()["policy"] == "admin"
    assert switched.set_by()["group_size"] == "flag"
    assert config.policy == "goodput"


@pytest.mark.parametrize("name", sorted(set(RolloutConfig.model_fields) - SWITCHABLE))
def test_what_the_server_was_built_from_cannot_be_switched(name: str):
    with pytest.raises(ConfigError, match=f"{name}: fixed at start; restart the server with --er-"):
        RolloutConfig().changed({name: getattr(RolloutConfig(), name)})


def test_a_resolved_configuration_is_immutable():
    with pytest.raises(ValidationError, match="frozen"):
        resolve().gamma = 1


def test_description_is_json():
    description = json.loads(json.dumps(resolve(flags={"gamma": "2"}).describe()))
    assert description["values"]["gamma"] == 2
    assert description["set_by"]["gamma"] == "flag"
    assert set(description["values"]) == set(description["set_by"]) == set(RolloutConfig.model_fields)


def test_marlins_layout_has_no_clip_search():
    """Refused before anything is loaded, under the name that chose Marlin."""
    with pytest.raises(ConfigError) as error:
        resolve(env={"SGLANG_ER_CLIP_SEARCH": "true"}, flags={"kernels": "cuda,marlin"})
    assert str(error.value) == (
        "--er-kernels: kernels is 'cuda,marlin'; with clip_search choose names without marlin, whose layout has none"
    )
    assert resolve(flags={"kernels": "cuda,triton", "clip_search": True}).clip_search
    assert resolve(flags={"kernels": "marlin,cuda"}).kernels == "marlin,cuda"


@pytest.mark.parametrize(
    ("names", "own"),
    [
        ("auto", True),
        ("cpu,reference", True),
        ("reference,cpu", False),
        ("marlin,cpu,reference", True),
        ("marlin", False),
    ],
)
def test_whose_kernels_a_cpu_uses_beyond_the_registry(names: str, own: bool):
    """Marlin only packs there: what is named behind it counts."""
    assert resolve(flags={"kernels": names}).own_kernels == own
