"""Makes `import torchvision` work beside a CPU build of torch.

PyPI's torchvision is a CUDA build. Beside a CPU torch its extension does not load, and the import then fails because
it describes two operators that the extension should have defined. transformers imports torchvision and SGLang imports
transformers before it loads any plugin, so a process that will import SGLang calls `install()` first.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)
_library: Any = None  # the operators live as long as this object does


def install() -> bool:
    """Define the missing operators; True if they were defined now. Needed once per process, harmless twice."""
    global _library
    if _library is not None or "torchvision" in sys.modules:
        return False
    spec = find_spec("torchvision")
    if spec is None or spec.origin is None:
        return False
    import torch

    # Whether torchvision works by itself is decided by its extension alone; loading it is what its import does anyway.
    for extension in Path(spec.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(str(extension))
        except OSError:
            continue
    if hasattr(torch.ops.torchvision, "nms"):
        return False
    _library = torch.library.Library("torchvision", "DEF")
    for schema in _SCHEMAS:
        _library.define(schema)
    return True
