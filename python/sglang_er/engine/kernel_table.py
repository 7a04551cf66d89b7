"""Who computes which op: what was chosen, and the table of measured times at start-up, of which the first rank's file
serves all ranks, so that all choose alike."""

from __future__ import annotations

import json
import logging

import torch

from sglang_er.config import ConfigError
from sglang_er.engine.ranks import Ranks
from sglang_er.kernels import LibraryError, registry, table_files
from sglang_er.kernels.dispatch_table import TableError

logger = logging.getLogger(__name__)


def install(choice: str, device: str, ranks: Ranks) -> None:
    """To be called before anything computes: what a CUDA graph was recorded with stays. `choice`: the option
    `kernel_table`; `device`: the GPU's name. Raises ConfigError, on all ranks, where the first one's file is no use."""
    found, mistake = table_files.Found(), ""
    if ranks.first:
        try:
            found = table_files.find(choice, device)
        except (TableError, LibraryError) as error:
            mistake = str(error)
    text, shown, warning, mistake = json.loads(ranks.told(json.dumps([*found, mistake])))
    if mistake:
        raise ConfigError(f"kernel_table: {mistake}")
    if warning:
        logger.warning("sglang-er: %s", warning)
    if text:
        registry.use_table(table_files.of_text(text, shown))
        logger.info("sglang-er: kernels are chosen by size with the table %s", shown)


def chosen(device: str, dtype: torch.dtype) -> dict[str, str]:
    """Of every op of a draft pass and of verification: the implementation that is asked first, in words."""
    dtypes = dict.fromkeys(("draft_sample", "choose_seeded", "verify_chain"), torch.float32)
    ops = ["quantize_pack", "w4a16_linear", "w4a8_linear", "paged_attention", "kv_shadow_store"]
    ops += ["softmax_rows", "draft_sample", "verify_chain", *([] if device == "cpu" else ["choose_seeded"])]
    return {op: registry.describe(op, device, dtypes.get(op, dtype)) for op in ops}
