"""The model card of a made checkpoint: README.md for people, er_model_card.json for programs."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sglang_er import __version__


@dataclass(frozen=True)
class ModelCard:
    """What a checkpoint is and how it was made. `alpha` and `kappa` are None where they do not apply.

    alpha is the acceptance of a W4 draft at temperature 1 (docs/models.md says how it is measured).
    """

    shape: str
    arch: str
    function: str
    sizes_of: str
    sizes: dict[str, Any]
    parameters: int
    dtype: str
    seed: int
    target_alpha: float | None
    alpha: float | None
    alpha_source: str
    kappa: float | None
    made_by: str = f"sglang-er {__version__}"

    def write(self, directory: Path) -> None:
        """Write both files into `directory`."""
        (directory / "er_model_card.json").write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        (directory / "README.md").write_text(self.text(), encoding="utf-8")

    def text(self) -> str:
        """The card as Markdown."""
        rows = {
            "architecture": self.arch,
            "layer sizes of": self.sizes_of,
            "sizes": ", ".join(f"{name} {value}" for name, value in self.sizes.items()),
            "parameters in matrices": f"{self.parameters:,}",
            "dtype": self.dtype,
            "target alpha": _number(self.target_alpha),
            "alpha (W4 draft, temperature 1)": f"{_number(self.alpha)} ({self.alpha_source})",
            "kappa": _number(self.kappa),
            "seed": self.seed,
            "made by": self.made_by,
        }
        table = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
        return f"# {self.arch} {self.shape}\n\n{self.function}\n\n| | |\n| --- | --- |\n{table}"


def _number(value: float | None) -> str:
    return "does not apply" if value is None else f"{value:.4f}"
