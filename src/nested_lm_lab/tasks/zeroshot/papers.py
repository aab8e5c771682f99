"""The papers' zero-shot rows, to be printed beside ours."""

import importlib.resources
import json
import re
from dataclasses import dataclass

_UNITS = {"M": 1e6, "B": 1e9}


@dataclass(frozen=True)
class PaperRow:
    """A row as printed. scores: by `task/metric`, accuracies in percent. hybrid: with attention.

    recomputed_average: of the eight accuracies, where it is not what the paper prints.
    """

    model: str
    hybrid: bool
    scale: str
    source: str
    scores: dict[str, float]
    average: float
    recomputed_average: float | None = None

    @property
    def parameters(self) -> float:
        """Parameters that the paper's scale names."""
        number, unit = re.match(r"([\d.]+)([MB])", self.scale).groups()  # type: ignore[union-attr]
        return float(number) * _UNITS[unit]


def paper_rows() -> list[PaperRow]:
    """All rows, in the order of the tables."""
    text = importlib.resources.files("nested_lm_lab.tasks.zeroshot").joinpath("papers.json").read_text(encoding="utf-8")
    return [PaperRow(**row) for row in json.loads(text)["rows"]]


def nearest_rows(parameters: int) -> list[PaperRow]:
    """The rows of the scale that is nearest to a model's size."""
    rows = paper_rows()
    nearest = min((row.parameters for row in rows), key=lambda size: abs(size - parameters))
    return [row for row in rows if row.parameters == nearest]
