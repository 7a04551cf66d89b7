"""`--gpu`: records of a pretended GPU give its constants back, one by one, and each says whether it was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from support.gpu_records import Record, bench, record, write

from sglang_er.bench.kernels import layers_of
from sglang_er.cli import main as cli
from sglang_er.rollout import gpu_constants, gpu_records, gpu_roofline
from sglang_er.rollout.roofline import BF16_BYTES, MODELS, PRESETS, W4_BYTES, Device, Linear, RooflineCosts

NAME, SHAPE = MODELS["7b"]
DEVICE = "NVIDIA H200"
ROWS = (1, 4, 16, 64, 128)
LAUNCH = 7e-6
# What the pretended GPU does. Nobody measured it.
TRUTH = Device(
    name="truth",
    bandwidth=4.2e12,
    flops=PRESETS["h200"].flops,
    target=replace(PRESETS["h200"].target, bandwidth=0.9, measured=tuple(zip(ROWS, (0.9, 0.88, 0.86, 0.8, 0.7)))),
    drafter=replace(PRESETS["h200"].drafter, bandwidth=0.7, measured=tuple(zip(ROWS, (0.7, 0.7, 0.6, 0.3, 0.16)))),
    attention=0.75,
    draft_attention=2.5,
    layer_seconds=19e-6,
    verify_seconds=0.33e-3,
    sources="none",
    draft_layer_seconds=11e-6,
)
COSTS = RooflineCosts(TRUTH, NAME, SHAPE)


def linear(
    op: str, name: str, device: Linear, weight_bytes: float, slower: float = 1.0, skip: str = ""
) -> list[Record]:
    found = []
    for layer in layers_of(SHAPE):
        nbytes = layer.rows * layer.cols * weight_bytes
        rows = {
            f"M={m}": {
                "us": 1e6 * slower * nbytes / (TRUTH.bandwidth * share),
                "at": ["group 128", [m, layer.rows, layer.cols]],
            }
            for m, share in device.measured
        }
        facts = {"model": NAME, "layer": layer.name, "count": layer.count}
        if layer.name != skip:
            found.append(bench(op, name, f"{layer.name} {layer.rows}x{layer.cols}", rows, facts))
    return found


def attention(name: str, slower: float = 1.0) -> list[Record]:
    rate = TRUTH.bandwidth * TRUTH.attention * TRUTH.draft_attention
    found = []
    for batch, context in ((1, 2048), (8, 8192), (64, 8192)):
        nbytes = 2 * batch * context * SHAPE.kv_heads * SHAPE.head_dim * BF16_BYTES
        row = {"us": 1e6 * slower * (LAUNCH + nbytes / rate), "context": context, "kv_bytes": nbytes}
        row["at"] = ["int4 head_dim 128", [batch, SHAPE.query_heads, SHAPE.kv_heads]]
        decode = {"us": 1.0, "context": context, "kv_bytes": nbytes, "at": ["pool head_dim 128", [batch, 28, 4]]}
        rows = {"decode int4": row, "decode": decode, "verify 4": {"us": 1.0, "context": context, "kv_bytes": nbytes}}
        found.append(bench("paged_attention", name, f"B={batch} S={context}", rows))
    return found


def rollout(batch: int, context: int, model: str = NAME, **changes) -> Record:
    output = 128
    mean = context + output / 2

    def step(gamma: int) -> float:
        drafted = gamma * COSTS.draft(batch, mean) + COSTS.verify(batch, mean, gamma)
        return 1e3 * (drafted if gamma else COSTS.plain(batch, mean))

    arms = {"plain": {"step_ms": {"0": step(0)}}, "goodput": {"step_ms": {"0": step(0), "7": step(7)}}}
    arms |= {f"fixed:{g}": {"step_ms": {"1": 2 * step(1), str(g): step(g)}} for g in (3, 5)}
    values = {"batch": batch, "context": context, "output": output, "arms": arms}
    values["model"] = f"qwen2 7b, layer sizes of {model}"
    return record("rollout", f"7b B={batch} S={context}", values, **changes)


COPY = record("bench_kernels", "copy", {"bytes_per_second": TRUTH.bandwidth})
TARGET = linear("bf16_linear", "torch", TRUTH.target, BF16_BYTES)
DRAFTER = linear("w4a16_linear", "cuda", TRUTH.drafter, W4_BYTES)
STEPS = [rollout(1, 1024), rollout(16, 8192), rollout(16, 1024)]
EVERYTHING = [
    COPY,
    *TARGET,
    *DRAFTER,
    *linear("w4a16_linear", "triton", TRUTH.drafter, W4_BYTES, slower=1.5),
    *attention("cuda"),
    *attention("triton", slower=2.0),
    *STEPS,
]


def measured(records: list[Record], level: str = "today") -> tuple[Device, dict[str, str]]:
    device, constants = gpu_constants.measured(gpu_roofline.of_level(PRESETS["h200"], level), records, level)
    return device, {constant.name: constant.source for constant in constants}


@pytest.mark.parametrize("level", ["today", "target"])
def test_records_of_everything_give_the_machine_back(level: str):
    device, sources = measured(EVERYTHING, level)
    said = "measured, commit abc123 on 2026-12-01"
    assert sources == dict.fromkeys(sources, said) | {"bf16 FLOPs": "data sheet"}
    costs = RooflineCosts(device, NAME, SHAPE)
    for batch, context in ((1, 1024), (8, 8192), (64, 4096)):
        assert costs.plain(batch, context) == pytest.approx(COSTS.plain(batch, context), rel=1e-6)
        assert costs.draft(batch, context) == pytest.approx(COSTS.draft(batch, context), rel=1e-6)
        for gamma in (1, 7):
            assert costs.verify(batch, context, gamma) == pytest.approx(COSTS.verify(batch, context, gamma), rel=1e-6)


def test_without_records_there_are_the_estimates():
    device, sources = measured([])
    assert device == PRESETS["h200"]
    assert [name for name, source in sources.items() if source != "estimated"] == ["bf16 FLOPs", "bandwidth"]
    assert sources["bandwidth"] == "data sheet"


@pytest.mark.parametrize(
    ("records", "names"),
    [
        ([COPY], {"bandwidth"}),
        (TARGET, {"linear layers of a step"}),
        (DRAFTER, {"linear layers of a draft"}),
        (attention("cuda"), {"attention of a draft"}),
        (attention("cuda")[:1], set()),  # one size: launch and rate cannot be told apart
        (linear("bf16_linear", "torch", TRUTH.target, BF16_BYTES, skip="down"), set()),  # not the whole forward
        ([STEPS[0]], {"fixed, per layer", "fixed, per draft layer", "fixed, per verify"}),
        ([rollout(1, 1024, "Qwen2.5-1.5B")], set()),  # a shape that the formula does not have
        ([rollout(1, 1024, status="failed")], set()),
        (STEPS[1:], {"attention of a step", "fixed, per layer", "fixed, per draft layer", "fixed, per verify"}),
    ],
)
def test_what_was_not_measured_stays_an_estimate(records: list[Record], names: set[str]):
    _, sources = measured(records)
    assert {name for name, source in sources.items() if source.startswith("measured")} == names


def test_weights_in_a_librarys_layout_are_not_drafted_with():
    """Marlin's and Humming's rows have no sizes of ours: the draft's constants are of our own layout."""
    faster = linear("w4a16_linear", "marlin", TRUTH.drafter, W4_BYTES, slower=0.5)
    for row in (row for entry in faster for row in entry["values"]["rows"].values()):
        del row["at"]
    assert measured([*EVERYTHING, *faster]) == measured(EVERYTHING)


def test_estimated_shares_keep_their_bytes_per_second():
    """They were published against the data sheet's bandwidth, and a copy does not reach that."""
    device, _ = measured([COPY])
    assert device.bandwidth == 4.2e12
    before, after = (RooflineCosts(d, NAME, SHAPE) for d in (PRESETS["h200"], device))
    for batch, context in ((1, 512), (64, 8192)):
        assert after.plain(batch, context) == pytest.approx(before.plain(batch, context))
        assert after.draft(batch, context) == pytest.approx(before.draft(batch, context))


def test_the_measured_attention_launch_takes_the_place_of_the_estimated_one():
    device, sources = measured(attention("cuda"))
    assert device.draft_layer_seconds == pytest.approx(PRESETS["h200"].layer_seconds - 12e-6 + LAUNCH)
    assert device.layer_seconds == PRESETS["h200"].layer_seconds
    assert sources["fixed, per draft layer"].startswith("estimated, but for its attention launch: measured, commit abc")


def test_more_rows_never_take_less_time():
    noisy = replace(TRUTH.target, measured=((1, 0.5), (4, 0.8), (16, 0.6)))
    device, _ = measured(linear("bf16_linear", "torch", noisy, BF16_BYTES))
    shares = [share for _, share in device.target.measured]
    assert shares == sorted(shares, reverse=True)


def test_beyond_the_last_rows_the_formula_goes_on_from_there():
    linear_layers = TRUTH.drafter
    memory, compute = 1e-3, 1e-5
    at = [linear_layers.seconds(memory, compute * rows, rows) for rows in (128, 128.001, 256, 4096, 8192)]
    assert at[1] == pytest.approx(at[0], rel=1e-4) and at == sorted(at)
    assert at[4] / at[3] == pytest.approx(2, rel=0.05)  # bound by arithmetic


def test_the_newest_measurement_counts_and_all_commits_are_named():
    older = [{**entry, "date": "2026-11-30T00:00:00Z", "commit": "old"} for entry in TARGET]
    newer = [{**entry, "date": "2026-12-02T00:00:00Z"} for entry in TARGET[1:]]
    _, sources = measured([*older, *newer])
    assert sources["linear layers of a step"] == "measured, commit old on 2026-11-30, commit abc123 on 2026-12-02"


# -- the command -----------------------------------------------------------------------------------------------------

SMALL = ["--requests", "8", "--seeds", "2", "--lengths", "lognormal:40,1,200", "--policy", "fixed:3"]


@pytest.fixture(autouse=True)
def nothing_committed(monkeypatch):
    monkeypatch.setattr(gpu_records, "committed", list)


def test_a_gpu_is_simulated_with_what_its_records_say(tmp_path: Path, capsys):
    file, out = write(tmp_path / "r.jsonl", [COPY, *TARGET]), tmp_path / "f.json"
    assert cli.main(["simulate", "--gpu", "h200", "--gpu-records", str(file), *SMALL, "--json", str(out)]) == 0
    lines = {
        line[11:].split(":")[0]: line
        for line in capsys.readouterr().out.splitlines()
        if "per " in line or "of a" in line
    }
    assert lines["linear layers of a step"].endswith(
        "0.90 (1 rows) to 0.70 (128 rows) of the bandwidth  measured, commit abc123 on 2026-12-01"
    )
    assert lines["fixed, per verify"].split()[-3:] == ["0.40", "ms", "estimated"]
    costs = json.loads(out.read_text())["costs"]
    assert costs["name"] == "h200 (today), Qwen2.5-7B"
    assert costs["constants"][1] == {
        "name": "bandwidth",
        "value": "4.200 TB/s",
        "source": "measured, commit abc123 on 2026-12-01",
    }


def test_what_a_run_leaves_in_its_folder_is_not_committed(tmp_path: Path, monkeypatch):
    monkeypatch.undo()
    for name in ("h200", "out"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "gpu_check.jsonl", [COPY])
    assert gpu_records.committed(tmp_path) == [tmp_path / "h200" / "gpu_check.jsonl"]
    assert gpu_records.committed(tmp_path / "none") == []


def test_committed_records_of_the_gpu_are_found(tmp_path: Path, monkeypatch, capsys):
    other = {**COPY, "device": "NVIDIA H100 80GB HBM3", "date": "2026-12-03T00:00:00Z"}
    file = write(tmp_path / "r.jsonl", [COPY, other])
    monkeypatch.setattr(gpu_records, "committed", lambda: [file])
    assert cli.main(["simulate", "--gpu", "h200", *SMALL]) == 0
    assert "4.200 TB/s" in capsys.readouterr().out
    assert cli.main(["simulate", "--gpu", "a100", *SMALL]) == 0
    assert "measured" not in capsys.readouterr().out


@pytest.mark.parametrize("level", gpu_roofline.LEVELS)
def test_levels_bound_each_other(level: str):
    """The bound is below what kernels reach, and ours are to be faster than today's in a draft, where they are."""
    costs, constants = gpu_roofline.make("h200", "7b", level, None)
    today, _ = gpu_roofline.make("h200", "7b", "today", None)
    assert costs.draft(16, 4096) <= today.draft(16, 4096) and costs.plain(16, 4096) <= today.plain(16, 4096)
    assert (level == "physical") == all(constant.source == "data sheet, nothing lost" for constant in constants)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--gpu", "b200"], "--gpu b200: must be one of a100, h100, h200"),
        (["--gpu", "cpu"], "--gpu cpu: must be one of"),
        (["--gpu", "h200", "--preset", "h200"], "choose one of --sweep, --preset and --gpu"),
        (["--gpu", "h200", "--gpu-level", "best"], "--gpu-level best: must be one of physical, today, target"),
        (["--preset", "h200", "--gpu-level", "today"], "--gpu-level goes with --gpu"),
        (["--preset", "h200", "--gpu-records", "RECORDS"], "--gpu-records goes with --gpu"),
        (["--gpu", "h200", "--gpu-level", "physical", "--gpu-records", "RECORDS"], "no record changes it"),
        (["--gpu", "h200", "--gpu-records", "none.jsonl"], "none.jsonl"),
        (["--gpu", "a100", "--gpu-records", "RECORDS"], "records of NVIDIA H200, none of a A100"),
        (["--gpu", "h200", "--gpu-records", "DAMAGED"], "damaged (KeyError: 'bytes_per_second')"),
        (["--gpu", "h200", "--private-kv", "1"], "--private-kv goes with --sweep"),
    ],
)
def test_a_mistake_is_one_line(options: list[str], words: str, tmp_path: Path, capsys):
    files = {"RECORDS": write(tmp_path / "r.jsonl", [COPY])}
    files["DAMAGED"] = write(tmp_path / "d.jsonl", [record("bench_kernels", "copy", {})])
    assert cli.main(["simulate", *(str(files.get(option, option)) for option in options), *SMALL]) == 2
    error = capsys.readouterr().err
    assert error.startswith("sglang-er simulate: ") and words in error and error.count("\n") == 1
