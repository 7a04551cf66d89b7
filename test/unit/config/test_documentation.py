"""docs/configuration.md has one row per option, with its default and its meaning as the code has them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from sglang_er.config import _NOT_OPTIONS, ENV_PREFIX, SWITCHABLE, RolloutConfig, _text, flag_of

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "configuration.md").read_text(encoding="utf-8")
ROWS = {
    cells[0].strip("` "): cells
    for line in PAGE.splitlines()
    if line.startswith("| `") and len(cells := [cell.strip() for cell in line.strip("|").split(" | ")]) == 4
}


def test_the_table_has_every_option_and_no_other():
    assert set(ROWS) == set(RolloutConfig.model_fields)


@pytest.mark.parametrize("name", RolloutConfig.model_fields)
def test_the_row_says_what_the_code_does(name: str):
    _, default, switchable, meaning = ROWS[name]
    assert default.strip("`") == (_text(getattr(RolloutConfig(), name)) or "none")
    assert switchable == ("yes" if name in SWITCHABLE else "no")
    assert RolloutConfig.model_fields[name].description in meaning


def test_flags_and_variables_on_the_page_exist():
    page = re.sub(r"^sglang-er: .*$", "", PAGE, flags=re.MULTILINE)  # error lines quote mistakes
    for flag in re.findall(r"--er-[a-z-]+", page):
        assert flag == "--er-config" or flag in map(flag_of, RolloutConfig.model_fields)
    for variable in re.findall(r"SGLANG_ER_[A-Z_]*[A-Z]", PAGE):
        assert variable in _NOT_OPTIONS or variable.removeprefix(ENV_PREFIX).lower() in RolloutConfig.model_fields


def test_every_variable_that_is_no_option_is_documented():
    assert all(f"`{variable}`" in PAGE for variable in _NOT_OPTIONS)
