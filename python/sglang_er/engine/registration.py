"""Early registration: run something right after a module of SGLang is first imported, wherever that happens.

Frameworks build ServerArgs without loading plugins, and the platform entry point, the only one consulted that
early, runs inside a half-finished import. A post-import hook is the one place where registering is possible.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import logging
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

logger = logging.getLogger(__name__)


class _PostImport(importlib.abc.MetaPathFinder):
    """Finds the module with the other finders and appends `action` to its execution; used once."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.name = name
        self.action = action

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _run(self.action, module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def after_import(name: str, action: Callable[[ModuleType], None]) -> None:
    """Call action(module) once `name` has been imported: now if it already is, else right after it is."""
    module = sys.modules.get(name)
    if module is not None and not getattr(getattr(module, "__spec__", None), "_initializing", False):
        _run(action, module)
        return
    if module is None:
        sys.meta_path.insert(0, _PostImport(name, action))


def _run(action: Callable[[ModuleType], None], module: ModuleType) -> None:
    try:
        action(module)
    except Exception:
        # An import of SGLang must never fail because of us; a server that needs us fails later, by name.
        logger.exception("sglang-er: could not extend %s", module.__name__)
