"""Makes an environment for another SGLang version outside of the repository, with this project installed in it.

What SGLang pins, in the version's own metadata, is installed as it says; everything else a text model on a CPU needs is
what requirements/cpu.lock has for the supported version.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from check_env import pins
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
# Imported by a version and needed by no other.
EXTRA: dict[str, tuple[str, ...]] = {}


def folder(version: str) -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "sglang-er" / "versions" / version


def make(version: str) -> Path:
    """The environment's folder; made if it is not there, with the project as it is now."""
    env = folder(version)
    if not (env / "finished").exists():
        shutil.rmtree(env, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "venv", str(env)], check=True)
        pip(env, "--no-deps", f"sglang=={version}")
        wanted = packages(version, requirements_of(env, "sglang"))
        torch = next(line for line in wanted if line.startswith("torch=="))
        pip(env, torch)  # with its dependencies: a CUDA build needs its libraries, and brings its own triton
        if any(need.name == "triton" for need in requirements_of(env, "torch")):
            wanted = [line for line in wanted if not line.startswith("triton==")]
        pip(env, "--no-deps", *wanted)
        (env / "finished").write_text("\n".join(wanted) + "\n")
    install_project(env)
    return env


def pip(env: Path, *arguments: str) -> None:
    print(f"check_versions: pip install {' '.join(arguments[:3])}{' ...' * (len(arguments) > 3)}", file=sys.stderr)
    command = [str(env / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*command, *arguments], check=True)


def requirements_of(env: Path, name: str) -> list[Requirement]:
    """What an installed package asks for on this machine, extras left out."""
    site = next(env.glob("lib/python*/site-packages"))
    found = next(iter(metadata.distributions(name=name, path=[str(site)])))
    needs = [Requirement(line) for line in found.requires or []]
    return [need for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]


def packages(version: str, needs: list[Requirement]) -> list[str]:
    """Requirement lines: the lock's packages, each at the version of the lock where SGLang takes it."""
    asked = {canonical(need.name): need for need in needs}
    locked = pins(ROOT / "requirements" / "torch.lock") | pins(ROOT / "requirements" / "cpu.lock")
    lines = []
    for name, pin in locked.items():
        need = asked.get(canonical(name))
        if name == "sglang":
            continue
        if need is None or need.specifier.contains(pin):
            lines.append(f"{name}=={pin}")
        else:
            lines.append(f"{name}{need.specifier}")
    # torchvision 0.(n + 15) belongs to torch 2.n; SGLang leaves it open.
    torch = next(line for line in lines if line.startswith("torch==2."))
    vision = f"torchvision==0.{int(torch.split('.')[1]) + 15}.*"
    kept = [line for line in lines if not line.startswith("torchvision==")]
    return [*kept, vision, *EXTRA.get(version, ())]


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def install_project(env: Path) -> None:
    """As a wheel: what users get, and the checkout stays as it is."""
    wheels = env / "wheels"
    shutil.rmtree(wheels, ignore_errors=True)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(wheels)]
    subprocess.run([*build, str(ROOT)], check=True)
    pip(env, "--no-deps", "--force-reinstall", *map(str, wheels.glob("*.whl")))


if __name__ == "__main__":
    print(make(sys.argv[1]))
