"""Every mistake is one line that names where it was made and says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_er.config import ConfigError, RolloutConfig, resolve


def lines_of(**layers: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        resolve(**layers)
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ({"gama": 3}, "--er-gama: unknown option; did you mean gamma?"),
        ({"gamma": 99}, "--er-gamma: gamma is 99; choose a number from 0 to 16"),
        ({"gamma": -1}, "--er-gamma: gamma is -1; choose a number from 0 to 16"),
        ({"gamma": "x"}, "--er-gamma: gamma is 'x'; give a whole number"),
        ({"gamma": 2.5}, "--er-gamma: gamma is 2.5; give a whole number"),
        ({"gamma": True}, "--er-gamma: gamma is True; give a whole number"),
        (
            {"gamma": 9, "gamma_max": 8},
            "--er-gamma: gamma is 9; 9 is outside 0..gamma_max: choose at most 8, or raise gamma_max",
        ),
        ({"gamma_max": 0}, "--er-gamma-max: gamma_max is 0; choose a number from 1 to 16"),
        ({"gamma_max": 17}, "--er-gamma-max: gamma_max is 17; choose a number from 1 to 16"),
        ({"policy": "fix"}, "--er-policy: policy is 'fix'; choose one of goodput, threshold, fixed, cycle"),
        ({"group_size": 100}, "--er-group-size: group_size is 100; choose a multiple of 32"),
        ({"group_size": 0}, "--er-group-size: group_size is 0; choose a number from 32 to 1024"),
        ({"requantize": "perhaps"}, "--er-requantize: requantize is 'perhaps'; give true or false"),
        (
            {"rl_compat": "sessions,al"},
            "--er-rl-compat: rl_compat contains 'al'; "
            "give all, none, or any of sessions,spec_keys,weight_version,memory,guard",
        ),
        (
            {"rl_compat": "none,guard"},
            "--er-rl-compat: rl_compat is 'none,guard'; "
            "give all, none, or any of sessions,spec_keys,weight_version,memory,guard",
        ),
        (
            {"weight_check_seconds": -1},
            "--er-weight-check-seconds: weight_check_seconds is -1; choose a number from 0.0 to 86400.0",
        ),
        ({"cpu_threads": 0}, "--er-cpu-threads: cpu_threads is 0; choose a number from 1 to 1024"),
    ],
)
def test_one_mistake_gives_this_line(flags: dict[str, object], line: str):
    assert lines_of(flags=flags) == [line]


@pytest.mark.parametrize("thresholds", ["", "4", "4:3,2:1", "4:3,4:1", "0:3", "a:1", "1:b", 3, [[1, 2, 3]], []])
def test_malformed_thresholds_are_answered_with_the_form(thresholds: object):
    (line,) = lines_of(flags={"thresholds": thresholds})
    assert line.startswith("--er-thresholds: thresholds ")
    assert line.endswith("give pairs batch:gamma with batch sizes from 1 up and rising, like 1:5,4:3,16:1")


def test_draft_lengths_in_lists_obey_gamma_max():
    (line,) = lines_of(flags={"thresholds": "1:9"})
    assert (
        line == "--er-thresholds: thresholds is '1:9'; 9 is outside 0..gamma_max: choose at most 7, or raise gamma_max"
    )
    (line,) = lines_of(flags={"gamma_schedule": "0,8"})
    assert "8 is outside 0..gamma_max" in line
    (line,) = lines_of(flags={"gamma_schedule": "0,x"})
    assert line.endswith("give draft lengths with commas between, like 0,3,1,7")


@pytest.mark.parametrize("schedule", [{}, {"gamma_schedule": []}])
def test_cycling_needs_something_to_cycle_through(schedule: dict[str, object]):
    (line,) = lines_of(flags={"policy": "cycle", **schedule})
    assert "policy cycle needs at least one" in line


def test_all_mistakes_of_all_layers_are_reported_at_once(tmp_path: Path):
    file = tmp_path / "er.toml"
    file.write_text("gruop_size = 64\n")
    found = lines_of(file=file, env={"SGLANG_ER_GAMMAMAX": "3"}, flags={"policy": "fix", "gamma": 99})
    assert found == [
        f"{file}, gruop_size: unknown option; did you mean group_size?",
        "SGLANG_ER_GAMMAMAX: unknown option; did you mean gamma_max?",
        "--er-policy: policy is 'fix'; choose one of goodput, threshold, fixed, cycle",
        "--er-gamma: gamma is 99; choose a number from 0 to 16",
    ]


def test_an_unknown_option_near_nothing_lists_them_all():
    (line,) = lines_of(env={"SGLANG_ER_ZZZZZZ": "1"})
    assert all(name in line for name in RolloutConfig.model_fields)


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("er.toml", None, "cannot read the configuration file: No such file or directory"),
        ("er.yaml", "gamma: 1", "configuration files are .toml or .json"),
        ("er.toml", "gamma = ", "not valid TOML"),
        ("er.json", "{", "not valid JSON"),
        ("er.json", "[1]", "must hold one table of options, not a list"),
    ],
)
def test_an_unusable_file_is_named(tmp_path: Path, name: str, content: str | None, complaint: str):
    file = tmp_path / name
    if content is not None:
        file.write_text(content)
    (line,) = lines_of(file=file)
    assert line.startswith(f"{file}: ")
    assert complaint in line


def test_a_mistake_of_an_administrator_changes_nothing():
    config = RolloutConfig()
    with pytest.raises(ConfigError, match="gamma is 99; choose a number from 0 to 16"):
        config.changed({"gamma": 99})
    with pytest.raises(ConfigError, match="gama: unknown option; did you mean gamma"):
        config.changed({"gama": 1})
    assert config == RolloutConfig()
