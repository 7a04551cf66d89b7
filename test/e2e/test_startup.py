"""What cannot be served is refused at start-up: one clear line, a non-zero exit, before any weight is loaded."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.server import serve_command
from transformers import AutoConfig

from sglang_er.engine import identity
from sglang_er.rollout.launcher import choose_port

FlatModel = Callable[[str, int], Path]


def refuse(model: Path, *flags: str, env: dict[str, str] | None = None, port: int | None = None) -> str:
    """Run `sglang-er serve`, check that it fails, and return what it said last."""
    import os

    run = subprocess.run(
        serve_command(model, port or choose_port(None), *flags),
        capture_output=True,
        text=True,
        timeout=180,
        env={**os.environ, **(env or {})},
    )
    assert run.returncode not in (0, None), run.stdout
    assert "Traceback" not in run.stderr, run.stderr[-3000:]
    assert "Load weight begin" not in run.stdout + run.stderr
    said = [line for line in run.stderr.splitlines() if line.startswith("sglang-er: ")]
    assert len(said) == 1, run.stderr[-2000:]
    return said[0]


@pytest.mark.parametrize(
    ("flags", "env", "part"),
    [
        (("--er-gamma", "99"), {}, "choose a number from 0 to 16"),
        (("--er-group-size", "100"), {}, "choose a multiple of 32"),
        (("--er-kv-shadow", "fp8"), {}, "on a CPU 8 bits are int8: --er-kv-shadow int8"),
        (("--er-policy", "best"), {}, "choose one of goodput, threshold, fixed, cycle"),
        ((), {"SGLANG_ER_GAMA": "3"}, "did you mean gamma?"),
        (("--er-config", "/no/such.toml"), {}, "cannot read the configuration file"),
    ],
)
def test_bad_options(flat_model: FlatModel, flags: tuple[str, ...], env: dict[str, str], part: str) -> None:
    assert part in refuse(flat_model("qwen3", 0), *flags, env=env)


def test_unsupported_sglang(flat_model: FlatModel, tmp_path: Path) -> None:
    """Refused before anything of SGLang is imported: of another version it may be gone."""
    metadata = tmp_path / "sglang-0.6.0.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: sglang\nVersion: 0.6.0\n")
    said = refuse(flat_model("qwen3", 0), env={"PYTHONPATH": str(tmp_path)})
    assert "0.6.0 is installed" in said and "pip install sglang==0.5.21" in said


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        yield holder.getsockname()[1]


def changed_model(model: Path, out: Path, **changes: Any) -> Path:
    shutil.copytree(model, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, **changes}))
    return out


@pytest.mark.slow
def test_port_in_use(flat_model: FlatModel, taken_port: int) -> None:
    assert f"port {taken_port}" in refuse(flat_model("qwen3", 0), port=taken_port)


@pytest.mark.slow
def test_costs_of_another_engine(flat_model: FlatModel, tmp_path: Path) -> None:
    """All that the file says is true of this engine but the version, which is compared last: what is known before the
    weights are loaded is what the loaded engine says of itself."""
    model, costs = flat_model("qwen3", 0), tmp_path / "costs.json"
    config = AutoConfig.from_pretrained(model)
    here = identity.known_before(
        SimpleNamespace(hf_text_config=config, hf_config=config, dtype="float32"), "cpu", ranks=1, threads=2
    )
    costs.write_text(json.dumps({"format": 1, "measured_on": {**here, "version": "0.0"}, "model": {}}))
    flags = ("--dtype", "float32", "--er-cost-file", str(costs), "--er-cpu-threads", "2")
    assert "measured with version '0.0'" in refuse(model, *flags)


@pytest.mark.slow
def test_no_file_of_costs(flat_model: FlatModel, tmp_path: Path) -> None:
    said = refuse(flat_model("qwen3", 0), "--er-cost-file", str(tmp_path / "costs.json"))
    assert "costs.json: cannot read the file of costs" in said


@pytest.mark.slow
def test_no_checkpoint(tmp_path: Path) -> None:
    assert "no checkpoint there" in refuse(tmp_path / "nothing")


@pytest.mark.slow
def test_unsupported_flag(flat_model: FlatModel) -> None:
    assert "--pp-size 1" in refuse(flat_model("qwen3", 0), "--pp-size", "2")


@pytest.mark.slow
@pytest.mark.full
@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (("--tp-size", "2"), "inputs of down_proj, no multiple of --er-group-size 128: use --er-group-size 32"),
        (("--enable-lora", "--lora-paths", "a=b"), "LoRA"),
        (("--disaggregation-mode", "decode"), "PD disaggregation"),
        (("--rl-on-policy-target", "fsdp"), "--rl-on-policy-target"),
        (("--enable-return-hidden-states",), "hidden states"),
        (("--enable-torch-compile",), "--enable-torch-compile"),
    ],
)
def test_more_unsupported_flags(flat_model: FlatModel, flags: tuple[str, ...], part: str) -> None:
    assert part in refuse(flat_model("qwen3", 0), *flags)


@pytest.mark.slow
def test_already_quantized_target(flat_model: FlatModel, tmp_path: Path) -> None:
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    model = changed_model(flat_model("qwen3", 0), tmp_path / "fp8", quantization_config=quantization)
    assert "already quantized" in refuse(model)


@pytest.mark.slow
def test_plain_and_speculation_exclude_each_other(flat_model: FlatModel) -> None:
    flags = ("--plain", "--speculative-algorithm", "EFFICIENT_ROLLOUT")
    assert "exclude each other" in refuse(flat_model("qwen3", 0), *flags)
