"""The command dispatcher: quick to answer, strict about options, and ready for the processes that SGLang spawns."""

from __future__ import annotations

import subprocess
import sys
import types

import pytest

from sglang_er import __version__
from sglang_er.cli import main as cli
from sglang_er.config import ConfigError


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """A command `probe` with one option; it records what it was run with."""
    module = types.ModuleType("sglang_er.cli.probe")
    module.seen = []

    def add_arguments(parser):
        parser.add_argument("--model", default="none")

    def run(args):
        module.seen.append(args)
        return 3

    module.add_arguments, module.run = add_arguments, run
    monkeypatch.setitem(sys.modules, "sglang_er.cli.probe", module)
    monkeypatch.setitem(cli.COMMANDS, "probe", "a command of this test")
    return module


def test_a_command_gets_its_options_and_gives_the_exit_code(command):
    assert cli.main(["probe", "--model", "m"]) == 3
    assert command.seen[0].model == "m"


def test_an_unknown_option_is_an_error(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["probe", "--nope"])
    assert stopped.value.code == 2
    assert "--nope" in capsys.readouterr().err
    assert not command.seen


def test_options_are_forwarded_where_the_command_wants_them(command):
    command.FORWARD_UNKNOWN = True
    cli.main(["probe", "--mod", "x", "--model=m", "--port", "1"])
    assert command.seen[0].forwarded == ["--mod", "x", "--port", "1"]  # nothing is taken by abbreviation
    assert command.seen[0].model == "m"


def test_a_configuration_mistake_is_one_line_each_and_exit_2(command, capsys):
    def run(args):
        raise ConfigError("first\nsecond")

    command.run = run
    assert cli.main(["probe"]) == 2
    assert capsys.readouterr().err == "sglang-er: first\nsglang-er: second\n"


def test_an_unknown_command_names_the_known_ones(capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["srve"])
    assert stopped.value.code == 2
    assert "serve" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [[], ["--help"]])
def test_help_lists_the_commands(argv, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(argv)
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in cli.COMMANDS)


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.strip() == f"sglang-er {__version__}"


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([name, "--help"])
    assert stopped.value.code == 0
    assert f"sglang-er {name}" in capsys.readouterr().out


def test_help_needs_no_heavy_import():
    code = (
        "import sys\n"
        "from sglang_er.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'sglang', 'pydantic', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


SPAWNING_SCRIPT = """
import sys
from sglang_er.cli.main import main

def child(queue):
    import torchvision
    queue.put(torchvision.__version__)

if __name__ == "__main__":
    import multiprocessing
    assert "torch" not in sys.modules, "the parent imported torch"
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    process.join()
    print(queue.get() if process.exitcode == 0 else "failed")
"""


def test_a_spawned_process_can_import_torchvision(tmp_path):
    """SGLang's children import the main script first; the shim must be in place when they go on to transformers."""
    script = tmp_path / "main_script.py"
    script.write_text(SPAWNING_SCRIPT)
    done = subprocess.run([sys.executable, str(script)], check=False, capture_output=True, text=True)
    assert done.stdout.strip() not in ("", "failed"), done.stderr
