"""AReaL's config with our options becomes a command of `sglang-er serve`, checked without AReaL (areal_contract.py)."""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from support import areal_contract

from sglang_er.cli import serve
from sglang_er.config import ConfigError

PACKAGE = "sglang_er.integrations.areal"
EXAMPLE = Path(__file__).resolve().parents[3] / "examples" / "areal" / "grpo.yaml"


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "areal" or name.startswith(PACKAGE)]:
        monkeypatch.delitem(sys.modules, name)


@pytest.fixture
def areal(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """Our package over the pretended AReaL."""
    forget(monkeypatch)
    for name, module in areal_contract.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    requirement = importlib.import_module(f"{PACKAGE}.requirement")
    monkeypatch.setattr(requirement, "require", lambda: None)
    yield importlib.import_module(PACKAGE)
    forget(monkeypatch)


@functools.cache
def sglang_parser() -> argparse.ArgumentParser:
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    ServerArgs.add_cli_args(parser)
    return parser


def parsed(command: list[str]) -> tuple[argparse.Namespace, argparse.Namespace]:
    """What `sglang-er serve` and the installed SGLang make of a command; both refuse what they do not know."""
    assert command[1:4] == ["-m", "sglang_er.cli.main", "serve"]
    ours = argparse.ArgumentParser(allow_abbrev=False)
    serve.add_arguments(ours)
    known, forwarded = ours.parse_known_args(command[4:])
    return known, sglang_parser().parse_args(["--model-path", known.model_path, *forwarded])


def command_of(areal: ModuleType, **fields: Any) -> list[str]:
    from sglang_er.integrations.areal.backend import serve_command

    config = areal.ERSGLangConfig(model_path="M", **fields)
    # Arguments reach the workers that launch as JSON.
    return serve_command(json.loads(json.dumps(config.build_args(config, tp_size=2, base_gpu_id=0))))


def example() -> dict[str, Any]:
    """The `sglang` section of the example, its references resolved."""
    content = yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))

    def resolved(value: Any) -> Any:
        if isinstance(value, str) and (found := re.fullmatch(r"\$\{([\w.]+)\}", value)):
            return functools.reduce(lambda node, name: node[name], found[1].split("."), content)
        return value

    return {name: resolved(value) for name, value in content["sglang"].items()}


def test_the_example_becomes_a_command_that_both_parsers_take(areal):
    fields = example()
    command = command_of(areal, **{name: value for name, value in fields.items() if name != "model_path"})
    ours, theirs = parsed(command)
    assert (ours.er_policy, ours.er_gamma_max, ours.plain) == ("goodput", "7", False)
    assert theirs.skip_tokenizer_init and theirs.disable_radix_cache and theirs.trust_remote_code
    assert (theirs.tp_size, theirs.mem_fraction_static, theirs.chunked_prefill_size) == (2, 0.8, -1)
    assert command[0] == sys.executable


def test_options_of_every_form_arrive_as_they_were_meant(areal):
    options = {"policy": "threshold", "gamma_max": 9, "thresholds": [[1, 9], [4, 2]], "early_stop": False}
    ours, _ = parsed(command_of(areal, er={**options, "rl_compat": ["sessions", "guard"], "cost_file": None}))
    assert (ours.er_policy, ours.er_gamma_max, ours.er_thresholds) == ("threshold", "9", "1:9,4:2")
    assert (ours.er_early_stop, ours.er_rl_compat, ours.er_cost_file) == ("false", "sessions,guard", None)


def test_the_baseline_and_another_environments_python(areal):
    command = command_of(areal, er_plain=True, er_python="/opt/er/bin/python")
    assert command[0] == "/opt/er/bin/python" and parsed(command)[0].plain


def test_flags_without_a_field_win_over_fields(areal):
    flags = {"cuda_graph_max_bs_decode": 64, "disable_radix_cache": False, "max_total_tokens": 4096}
    _, theirs = parsed(command_of(areal, er_flags=flags))
    assert theirs.cuda_graph_max_bs_decode == 64 and theirs.max_total_tokens == 4096
    assert not theirs.disable_radix_cache


@pytest.mark.parametrize(
    ("fields", "line"),
    [
        ({"er": {"gama": 3}}, "sglang.er: --er-gama: unknown option; did you mean gamma?"),
        ({"er": {"gamma": 99}}, "sglang.er: --er-gamma: gamma is 99"),
        ({"cuda_graph_max_bs": 8}, "sglang.cuda_graph_max_bs: the SGLang of sglang-er has no such flag"),
    ],
)
def test_a_mistake_is_one_line_when_the_config_is_loaded(areal, fields, line):
    with pytest.raises(ConfigError) as raised:
        areal.ERSGLangConfig(model_path="M", **fields)
    assert str(raised.value).startswith(line) and "\n" not in str(raised.value)


def test_fields_that_are_refused_are_those_that_sglang_has_no_flag_for(areal):
    from sglang_er.integrations.areal.config import GONE

    known = {name for action in sglang_parser()._actions for name in action.option_strings}
    names = set(areal_contract.RECORDED["fields"]) - {"enable_multithread_load"}
    assert {name for name in names if "--" + name.replace("_", "-") not in known} == set(GONE)


@pytest.mark.parametrize(
    ("section", "value", "line"),
    [
        ("rollout", SimpleNamespace(_version="v2"), "rollout._version: v2"),
        ("actor", SimpleNamespace(use_lora=True), "actor.use_lora: "),
    ],
)
def test_what_the_server_would_refuse_later_is_refused_in_the_experiment(areal, section, value, line):
    areal.ERGRPOConfig()
    with pytest.raises(ConfigError, match=f"^{line}"):
        areal.ERGRPOConfig(**{section: value})


def test_lora_is_left_to_plain_decode(areal):
    areal.ERGRPOConfig(actor=SimpleNamespace(use_lora=True), sglang=areal.ERSGLangConfig(er_plain=True))


def test_the_engine_launches_with_our_backend_and_nothing_else_is_ours(areal, monkeypatch):
    started: list[tuple[list[str], dict[str, str]]] = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, env, **_: started.append((command, env)))
    monkeypatch.setenv("TRITON_CACHE_PATH", "/cache")
    backend = areal.ERRemoteSGLangEngine(SimpleNamespace())._engine.backend
    for _ in range(2):
        backend.launch_server(areal.ERSGLangConfig.build_args(areal.ERSGLangConfig(model_path="M"), 1, 0))
    assert started[0][0][1:6] == ["-m", "sglang_er.cli.main", "serve", "--tokenizer-path", "M"]
    caches = {env["TRITON_CACHE_PATH"] for _, env in started}
    assert len(caches) == 2 and all(cache.startswith("/cache/") for cache in caches)
    assert set(vars(areal.ERSGLangBackend)) - {"__module__", "__doc__"} == {"launch_server"}


@pytest.mark.parametrize("imported_before", [True, False])
def test_the_trainer_finds_our_engine(areal, monkeypatch, imported_before):
    trainer = ModuleType("areal.trainer.rl_trainer")
    trainer.RemoteSGLangEngine = sys.modules["areal.engine.sglang_remote"].RemoteSGLangEngine
    if imported_before:
        monkeypatch.setitem(sys.modules, trainer.__name__, trainer)
    areal.use_in_trainer()
    assert sys.modules["areal.engine"].RemoteSGLangEngine is areal.ERRemoteSGLangEngine
    assert (trainer.RemoteSGLangEngine is areal.ERRemoteSGLangEngine) == imported_before
    # Workers import the class by these two names.
    found = importlib.import_module(areal.ERRemoteSGLangEngine.__module__).ERRemoteSGLangEngine
    assert found is areal.ERRemoteSGLangEngine


@pytest.mark.parametrize("version", [None, "0.5.3", "1.0.3", "1.1.0", "2.0"])
def test_an_areal_that_does_not_fit_is_one_line(monkeypatch, version):
    forget(monkeypatch)
    found = None if version is None else SimpleNamespace()
    monkeypatch.setattr(util, "find_spec", lambda name: found)
    monkeypatch.setattr(metadata, "version", lambda name: version)
    package = importlib.import_module(PACKAGE)
    with pytest.raises(ImportError) as raised:
        _ = package.ERSGLangConfig
    said = str(raised.value)
    assert "\n" not in said and "1.0.4" in said and (version or "there is none") in said


@pytest.mark.parametrize("version", ["1.0.4", "1.0.4.post1", "1.0.12", "1.0.5.dev3+g12ab"])
def test_an_areal_that_fits_is_taken(monkeypatch, version):
    from sglang_er.integrations.areal import requirement

    monkeypatch.setattr(util, "find_spec", lambda name: SimpleNamespace())
    monkeypatch.setattr(metadata, "version", lambda name: version)
    requirement.require()


def test_an_unknown_name_is_no_attribute():
    with pytest.raises(AttributeError, match="no attribute 'Engine'"):
        _ = importlib.import_module(PACKAGE).Engine
