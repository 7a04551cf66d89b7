"""torchvision imports beside any torch once the shim is installed, and the shim knows when it is not needed."""

from __future__ import annotations

import subprocess
import sys


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_torchvision_imports_after_the_shim():
    assert run(
        "from sglang_er.compat import torchvision_shim as shim\n"
        "shim.install()\n"
        "assert shim.install() is False\n"  # twice does no harm
        "import torchvision.ops; print(torchvision.__version__)"
    )


def test_the_shim_acts_exactly_where_torchvision_would_fail():
    alone = subprocess.run([sys.executable, "-c", "import torchvision"], check=False, capture_output=True)
    acted = run("from sglang_er.compat import torchvision_shim as shim; print(shim.install())")
    assert acted == str(alone.returncode != 0)


def test_an_imported_torchvision_is_left_alone():
    assert (
        run(
            "import sys, types\n"
            "sys.modules['torchvision'] = types.ModuleType('torchvision')\n"
            "from sglang_er.compat import torchvision_shim as shim\n"
            "print(shim.install(), 'torch' in sys.modules)"
        )
        == "False False"
    )
