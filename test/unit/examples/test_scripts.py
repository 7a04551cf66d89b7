"""The examples' shell scripts without GPU, Ray or slime: what they would run is what the programs behind it accept."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from sglang_er.cli import serve

ROOT = Path(__file__).resolve().parents[3]
SCRIPTS = sorted((ROOT / "examples").rglob("*.sh"))
SLIME = ROOT / "examples" / "slime"


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, str]:
    """Every variable that a script insists on; paths with a space, to find a missing quote."""
    model_args = tmp_path / "model args.sh"
    model_args.write_text("MODEL_ARGS=(--num-layers 36 --hidden-size 2560)\n")
    names = ("SLIME_DIR", "MODEL", "REF_LOAD", "SAVE", "PROMPT_DATA", "UPDATE_DIR")
    paths = {name: f"/shared disk/{name.lower()}" for name in names}
    return {**paths, "MODEL_ARGS_FILE": str(model_args), "ENGINES": "one:10090 two:10091", "ROLLOUT_GPUS": "4"}


def run(script: str, settings: dict[str, str], *flags: str) -> subprocess.CompletedProcess[str]:
    env = {"PATH": os.environ["PATH"], "DRY_RUN": "1", **settings}
    return subprocess.run(["bash", str(SLIME / script), *flags], capture_output=True, text=True, env=env, timeout=60)


def commands(script: str, settings: dict[str, str], *flags: str) -> list[list[str]]:
    """The commands that a script would have run."""
    done = run(script, settings, *flags)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_accepts_the_script(script: Path):
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True, text=True).stderr == ""
    if os.access(script, os.X_OK):  # job.sh is only sourced
        assert "\nset -euo pipefail\n" in script.read_text()


@pytest.mark.parametrize("launcher", ["sglang-er", "sglang"])
def test_the_servers_get_flags_that_exist(launcher, settings, sglang_parser):
    settings |= {"LAUNCHER": launcher, "GPUS": "0 3", "CONTEXT_LENGTH": "8192"}
    first, second = commands("serve.sh", settings, "--dtype", "bfloat16")
    if launcher == "sglang-er":
        assert first[:2] == ["sglang-er", "serve"]
        ours = argparse.ArgumentParser(allow_abbrev=False)
        serve.add_arguments(ours)
        args, forwarded = ours.parse_known_args(first[2:])
        assert args.model_path == settings["MODEL"]
        flags = ["--model-path", args.model_path, *forwarded]
    else:
        assert first[1:3] == ["-m", "sglang.launch_server"]
        flags = first[3:]
    parsed = sglang_parser.parse_args(flags)
    assert parsed.model_path == settings["MODEL"] and parsed.dtype == "bfloat16" and parsed.enable_metrics
    assert parsed.context_length == 8192
    # slime compares this with its --offload-rollout, which must be off for engines that it did not start
    assert not parsed.enable_memory_saver
    assert (launcher == "sglang") == (parsed.speculative_algorithm == "EFFICIENT_ROLLOUT")
    assert parsed.port == 10090 and second[second.index("--port") + 1] == "10091"


def job(command: list[str]) -> tuple[dict[str, str], list[str]]:
    """The runtime environment and the command line of a submitted job."""
    assert command[:3] == ["ray", "job", "submit"]
    variables = json.loads(command[command.index("--runtime-env-json") + 1])["env_vars"]
    words = command[command.index("--") + 1 :]
    assert words[:2] == ["python3", "train.py"]
    return variables, words[2:]


def value(words: list[str], flag: str) -> str:
    assert words.count(flag) == 1, flag
    return words[words.index(flag) + 1]


@pytest.mark.parametrize(("sync", "transport"), [(None, "disk"), ("disk", "disk"), ("nccl", "nccl")])
def test_external_engines(sync, transport, settings):
    settings |= {"SYNC": sync} if sync else {}
    (command,) = commands("train_external.sh", settings, "--use-tis")
    variables, words = job(command)
    assert set(variables) == {"PYTHONPATH", "CUDA_DEVICE_MAX_CONNECTIONS"}
    assert str(SLIME) in variables["PYTHONPATH"].split(":")
    at = words.index("--rollout-external-engine-addrs")
    assert words[at + 1 : at + 3] == ["one:10090", "two:10091"] and words[at + 3].startswith("--")
    assert value(words, "--update-weight-transport") == transport
    assert ("--update-weight-disk-dir" in words) == (transport == "disk")
    assert words[-1] == "--use-tis"
    # slime's own engines, a patched server's endpoint, and what external engines exclude
    assert not {"--colocate", "--rollout-num-gpus", "--sglang-config", "--update-weight-local-checkpoint-dir"} & set(
        words
    )


@pytest.mark.parametrize("colocate", ["", "1"])
def test_engines_inside_slime_get_our_options_as_variables(colocate, settings):
    settings |= {"COLOCATE": colocate, "SGLANG_ER_GAMMA_MAX": "5", "SGLANG_ER_POLICY": "threshold"}
    (command,) = commands("train_inside.sh", settings)
    variables, words = job(command)
    assert variables["SGLANG_ER_GAMMA_MAX"] == "5" and variables["SGLANG_ER_POLICY"] == "threshold"
    assert ("--colocate" in words) == bool(colocate) != ("--rollout-num-gpus" in words)
    assert value(words, "--rollout-num-gpus-per-engine") == "1"


@pytest.mark.parametrize("script", ["train_external.sh", "train_inside.sh"])
def test_flags_for_the_engines_are_sglangs(script, settings, sglang_parser):
    """slime offers every flag of SGLang as --sglang-FLAG."""
    words = job(commands(script, settings)[0])[1]
    passed = [word for word in words if word.startswith("--sglang-")]
    assert value(words, "--sglang-speculative-algorithm") == "EFFICIENT_ROLLOUT"
    assert all(f"--{flag.removeprefix('--sglang-')}" in sglang_parser._option_string_actions for flag in passed)


@pytest.mark.parametrize("script", ["train_external.sh", "train_inside.sh"])
def test_flags_for_the_trainer_are_slimes(script, settings):
    """With SLIME_DIR, a checkout of slime: every other flag is written there (Megatron's, from MODEL_ARGS, are not)."""
    if not (checkout := os.environ.get("SLIME_DIR")):
        pytest.skip("SLIME_DIR names no checkout")
    known = (Path(checkout) / "slime" / "utils" / "arguments.py").read_text(encoding="utf-8")
    words = job(commands(script, settings)[0])[1]
    own = {word for word in words if word.startswith("--") and not word.startswith("--sglang-")}
    missing = [flag for flag in own - {"--num-layers", "--hidden-size"} if f'"{flag}"' not in known]
    assert not missing


def test_the_job_waits_for_the_engines_and_starts_in_slimes_checkout(settings, tmp_path):
    """Stand-ins for curl, which finds the first engine ready at its second call, and for ray."""
    stand_ins, called = tmp_path / "bin", tmp_path / "called"
    stand_ins.mkdir()
    asked = f'echo "${{@: -1}}" >> {called}; [ "$(wc -l < {called})" -gt 1 ]'
    for name, body in {"curl": asked, "sleep": ":", "ray": 'pwd; printf "%s\\n" "$@"'}.items():
        (stand_ins / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (stand_ins / name).chmod(0o755)
    checkout = tmp_path / "slime"
    checkout.mkdir()
    env = {**settings, "SLIME_DIR": str(checkout), "PATH": f"{stand_ins}:{os.environ['PATH']}", "DRY_RUN": ""}
    done = run("train_external.sh", env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[:4] == [str(checkout), "job", "submit", "--address"]
    addresses = [f"http://{engine}/health_generate" for engine in ("one:10090", "one:10090", "two:10091")]
    assert called.read_text().splitlines() == addresses


@pytest.mark.parametrize(
    ("script", "dropped"),
    [
        ("serve.sh", "MODEL"),
        ("train_external.sh", "ENGINES"),
        ("train_external.sh", "UPDATE_DIR"),
        ("train_external.sh", "SLIME_DIR"),
        ("train_inside.sh", "ROLLOUT_GPUS"),
    ],
)
def test_a_missing_variable_is_named(script, dropped, settings):
    done = run(script, {name: text for name, text in settings.items() if name != dropped})
    assert done.returncode != 0 and dropped in done.stderr and done.stdout == ""


def test_a_wrong_choice_is_refused(settings):
    assert "choose disk or nccl" in run("train_external.sh", settings | {"SYNC": "tensor"}).stderr
    assert "choose sglang-er or sglang" in run("serve.sh", settings | {"LAUNCHER": "vllm"}).stderr


def test_the_readme_names_every_variable():
    page = (SLIME / "README.md").read_text(encoding="utf-8")
    for script in SLIME.glob("*.sh"):
        used = set(re.findall(r"\$\{([A-Z][A-Z_]+)[:+-]", script.read_text())) - {"BASH_SOURCE", "PYTHONPATH"}
        assert {name for name in used if f"`{name}`" not in page} == set(), script.name
