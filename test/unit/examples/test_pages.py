"""The commands for servers on the pages for users: every flag exists in the installed SGLang or is ours."""

from __future__ import annotations

import argparse
import re
import shlex
from pathlib import Path

import pytest

from sglang_er.cli import serve

ROOT = Path(__file__).resolve().parents[3]
LAUNCHERS = (["sglang-er", "serve"], ["python", "-m", "sglang.launch_server"])
TRAINERS = ("docs/slime.md", "docs/miles.md", "examples/openai_loop/README.md")


def server_commands(page: Path) -> list[list[str]]:
    """The arguments of each command in the page's bash blocks that starts a server."""
    blocks = re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    starts = tuple(" ".join(start) for start in LAUNCHERS)
    words = [shlex.split(line, comments=True) for line in lines if line.startswith(starts)]
    return [line[len(start) :] for line in words for start in LAUNCHERS if line[: len(start)] == start]


PAGES = sorted(
    str(page.relative_to(ROOT))
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("README.md"))
    if server_commands(page)
)


def test_the_pages_for_trainers_are_among_them():
    assert set(TRAINERS) <= set(PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_servers_accept_the_flags(page: str, sglang_parser: argparse.ArgumentParser):
    for words in server_commands(ROOT / page):
        ours = argparse.ArgumentParser(allow_abbrev=False)
        serve.add_arguments(ours)
        args, forwarded = ours.parse_known_args([word for word in words if word not in ("...", "&")])
        sglang_parser.parse_args(["--model-path", args.model_path, *forwarded])
