"""The rules that scripts/check_house.py keeps: the tree obeys them, and each broken one is reported."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_spec = importlib.util.spec_from_file_location("check_house", ROOT / "scripts" / "check_house.py")
house = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(house)


def test_the_tree_obeys_the_rules_of_the_house():
    assert house.violations(ROOT) == []


@pytest.mark.parametrize(
    ("path", "line", "complaint"),
    [
        ("policy/x.py", "import torch", "pure Python"),
        ("policy/x.py", "def f():\n    from sglang.srt import y", "pure Python"),
        ("twin/x.py", "from sglang.srt.layers import linear", "only engine/"),
        ("cli/x.py", "import sglang.srt.server_args", "only engine/"),
        ("kernels/x.py", "from sglang_er.twin import packed", "other way"),
        ("kernels/x.py", "from sglang_er import engine", "other way"),
        ("kernels/reference/x.py", "from ...sampling import chain", "other way"),
        ("policy/__init__.py", "from ..engine import worker", "other way"),
        ("twin/x.py", "from sglang_er.policy.base import Policy", "other way"),
        ("engine/x.py", "from sglang_er.rollout import client", "other way"),
        ("rollout/x.py", "from sglang_er.bench import stream", "other way"),
        ("config.py", "from sglang_er.engine import worker", "other way"),
        ("attic/x.py", "import os", "not in the plan"),
    ],
)
def test_a_forbidden_import_is_reported(tmp_path: Path, path: str, line: str, complaint: str):
    file = tmp_path / "sglang_er" / path
    file.parent.mkdir(parents=True)
    file.write_text(line + "\n")
    assert any(complaint in message for message in house.import_violations(tmp_path))


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("engine/x.py", "from sglang.srt.managers import scheduler\nfrom sglang_er.policy import make_policy"),
        ("policy/x.py", "from .base import Policy\nfrom sglang_er.policy import fixed"),
        ("twin/x.py", "import torch\nfrom sglang_er.kernels import reference"),
        ("cli/x.py", "from sglang_er.engine import serve\nfrom sglang_er import __version__"),
        ("bench/x.py", "from sglang_er.kernels import isa\nfrom sglang_er.models import sizes"),
        ("plugin.py", "import sglang.srt.plugins\nfrom sglang_er.config import from_env"),
    ],
)
def test_an_allowed_import_is_not_reported(tmp_path: Path, path: str, line: str):
    file = tmp_path / "sglang_er" / path
    file.parent.mkdir(parents=True)
    file.write_text(line + "\n")
    assert list(house.import_violations(tmp_path)) == []


def test_machine_paths_and_large_files_are_reported(tmp_path: Path):
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    (tmp_path / "good.md").write_text("see docs/home/page, https://x.org/work/y, ~/work/z and $HOME/root/a\n")
    (tmp_path / "bad.md").write_text("ok\nopen /" + "home/alice/model\n")
    (tmp_path / "large.bin").write_bytes(bytes(house.MAX_FILE_BYTES + 1))
    subprocess.run(["git", "-C", str(tmp_path), "add", "."], check=True)
    found = list(house.file_violations(house.tracked_files(tmp_path)))
    assert len(found) == 2
    assert "bad.md:2" in found[0]
    assert "large.bin" in found[1]
