"""Words for what can be wrong with a configuration: each says what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import get_args

from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

FORMS = {
    "thresholds": "give pairs batch:gamma with batch sizes from 1 up and rising, like 1:5,4:3,16:1",
    "rl_compat": "give all, none, or any of sessions,spec_keys,weight_version,memory,guard",
    "kernels": "give auto, or any of cpu,cuda,triton,marlin,reference in the order of preference",
    "gamma_schedule": "give draft lengths with commas between, like 0,3,1,7",
}


def nearest(name: str, options: Iterable[str]) -> str:
    near = difflib.get_close_matches(name.lower(), list(options), n=1, cutoff=0.5)
    return f"; did you mean {near[0]}?" if near else f"; the options are {', '.join(options)}"


def explain(name: str, field: FieldInfo, mistake: ErrorDetails) -> str:
    """pydantic's verdict on a field, in our words."""
    got = f"{name} is {mistake['input']!r}"
    kind = mistake["type"]
    if kind == "value_error":
        return f"{got}; {mistake['ctx']['error']}"
    if name in FORMS:
        return f"{name} contains {mistake['input']!r}; {FORMS[name]}"
    if kind == "literal_error":
        return f"{got}; choose one of {', '.join(get_args(field.annotation))}"
    if kind in ("greater_than_equal", "less_than_equal"):
        limits = {type(limit).__name__: limit for limit in field.metadata}
        return f"{got}; choose a number from {limits['Ge'].ge} to {limits['Le'].le}"
    if kind == "multiple_of":
        return f"{got}; choose a multiple of {mistake['ctx']['multiple_of']}"
    if kind.startswith("int"):
        return f"{got}; give a whole number"
    if kind.startswith("bool"):
        return f"{got}; give true or false"
    return f"{got}; {mistake['msg'][0].lower()}{mistake['msg'][1:]} (see docs/configuration.md)"
