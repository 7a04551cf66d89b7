"""Costs kept in a file, with what they were measured on: on anything else they would be wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sglang_er.policy.cost_model import CostModel

FORMAT = 1


class StaleCosts(ValueError):
    """The file does not describe this engine; the message says why and what to do."""


def save(path: Path, model: CostModel, measured_on: Mapping[str, str]) -> None:
    """`measured_on`: device, model, dtype, plugin version and whatever else makes costs differ."""
    content = {"format": FORMAT, "measured_on": dict(measured_on), "model": model.to_json()}
    written = path.with_name(path.name + ".partial")
    written.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    written.replace(path)


def load(path: Path, here: Mapping[str, str]) -> CostModel:
    """Raises StaleCosts, in one line, for a file of another engine or none at all; OSError if it cannot be read."""
    advice = "measure again with `sglang-er calibrate`, or leave cost_file out"
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StaleCosts(f"{path}: not valid JSON ({error}); {advice}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise StaleCosts(f"{path}: no file of costs in format {FORMAT}; {advice}")
    then = content.get("measured_on")
    then = then if isinstance(then, dict) else {}
    for name, value in here.items():
        if then.get(name) != value:
            raise StaleCosts(f"{path}: measured with {name} {then.get(name)!r}, this is {value!r}; {advice}")
    try:
        return CostModel.from_json(content["model"])
    except (KeyError, ValueError) as error:
        raise StaleCosts(f"{path}: damaged ({error}); {advice}") from None
