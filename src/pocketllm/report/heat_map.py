"""Heat maps over depth and kind, with the number in each cell and colours that dichromats can tell apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pocketllm.report import svg
from pocketllm.report.charts import Chart
from pocketllm.report.model_facts import MatrixFacts, ModelFacts
from pocketllm.report.tables import Table, short

Grid = Sequence[Sequence[float | None]]
_TICKS = 5  # of the colour scale
_KINDS_AT_ONCE = 8  # columns that a phone can show with numbers in the cells
_BLOCKS_LABELLED = 16


class Cell(NamedTuple):
    """One number of a heat map and where it stands."""

    value: float
    block: int
    kind: str


def heat_charts(
    model: ModelFacts, *, name: str, title: str, unit: str, value: Callable[[MatrixFacts], float | None]
) -> list[Chart]:
    """Depth × kind, one chart; none where no matrix in a block has the value. unit: what the numbers are."""
    grid = model.grid(value)
    cells = [
        Cell(cell, block, kind)
        for block, row in enumerate(grid)
        for kind, cell in zip(model.kinds, row, strict=True)
        if cell is not None
    ]
    panels = heat_panels(grid, model.kinds, unit)
    if not panels:
        return []
    rows = [(str(block), *map(short, row)) for block, row in enumerate(grid)]
    table = Table(f"{title}, by block and kind", ("block", *model.kinds), rows)
    facts = {"unit": unit, "blocks": model.blocks, "kinds": len(model.kinds)}
    facts |= {"least": min(cells), "most": max(cells)}
    drawings = {f"heat-{name}-{n * _KINDS_AT_ONCE}": panel for n, panel in enumerate(panels)}
    return [Chart(name, title, drawings, table, facts)]


def heat_panels(grid: Grid, kinds: Sequence[str], unit: str) -> list[HeatPanel]:
    """One panel for every eight kinds, with a common scale; none where there is no value.

    Args:
        grid: [blocks][kinds], None where nothing is compressed. unit: what the numbers are.
    """
    values = [v for row in grid for v in row if v is not None]
    if not values:
        return []
    low, high = min(values), max(values)
    if 0 <= low < 1e-3 and high > 0:  # shorter in thousandths
        grid = [[None if v is None else 1000 * v for v in row] for row in grid]
        low, high, unit = 1000 * low, 1000 * high, f"{unit}, thousandths"
    labels = short_kinds(kinds)
    parts = [slice(start, start + _KINDS_AT_ONCE) for start in range(0, len(kinds), _KINDS_AT_ONCE)]
    return [HeatPanel([row[part] for row in grid], labels[part], unit, low, high) for part in parts]


@dataclass(frozen=True)
class HeatPanel:
    """Blocks downwards, kinds to the right. low, high: ends of the scale, which may be of several panels."""

    grid: Grid
    labels: Sequence[str]
    unit: str
    low: float
    high: float

    @property
    def height(self) -> float:
        return 15 * len(self.grid) + 6.5 * max(len(label) for label in self.labels) + 70

    def draw(self, figure: Any, axes: Any) -> None:
        import numpy as np

        numbers = np.array([[math.nan if v is None else v for v in row] for row in self.grid])
        mesh = axes.pcolormesh(
            np.ma.masked_invalid(numbers), cmap="cividis", norm=self._norm(), edgecolor="none", linewidth=0
        )
        digits = 3 if self.low >= 0.01 else 2
        for row, line in enumerate(self.grid):
            for column, value in enumerate(line):
                colour = svg.MUTED if value is None else _readable_on(mesh.to_rgba(value))
                style = {"ha": "center", "va": "center_baseline", "fontsize": 9, "color": colour}
                axes.text(column + 0.5, row + 0.5, short(value, digits), **style)
        axes.set_ylim(len(self.grid), 0)
        axes.xaxis.tick_top()
        axes.set_xticks([n + 0.5 for n in range(len(self.labels))], self.labels, rotation=90)
        blocks = range(0, len(self.grid), max(1, len(self.grid) // _BLOCKS_LABELLED))
        axes.set_yticks([n + 0.5 for n in blocks], [str(n) for n in blocks])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_ylabel("block")
        self._draw_scale(figure.colorbar(mesh, ax=axes, orientation="horizontal", aspect=40, pad=0.01))

    def _norm(self) -> Any:
        """Linear, over at least a fifth of the largest value; logarithmic over more than a factor of 20."""
        from matplotlib.colors import LogNorm, Normalize

        low, high = self.low, self.high
        if low > 0 and high / low > 20:
            return LogNorm(low, high)
        least = 0.2 * abs(high) or 1.0
        if high - low < least:  # nearly equal values get nearly equal colours
            middle = (low + high) / 2
            return Normalize(middle - least / 2, middle + least / 2)
        return Normalize(low, high)

    def _draw_scale(self, bar: Any) -> None:
        from matplotlib.colors import LogNorm

        logarithmic = isinstance(bar.norm, LogNorm)
        low, high = bar.norm.vmin, bar.norm.vmax
        parts = [part / (_TICKS - 1) for part in range(_TICKS)]
        ticks = [low * (high / low) ** part if logarithmic else low + (high - low) * part for part in parts]
        bar.set_ticks(ticks, labels=[short(tick, 2) for tick in ticks], minor=False)
        bar.minorticks_off()
        bar.outline.set_visible(False)
        bar.set_label(f"{self.unit}; logarithmic scale" if logarithmic else self.unit)


def _readable_on(rgba: Sequence[float]) -> str:
    """Black or white, whichever stands out more from the colour (relative luminance as in WCAG)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgba[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"


def short_kinds(kinds: Sequence[str]) -> list[str]:
    """The shortest suffixes of the names that are still distinct."""
    parts = [kind.split(".") for kind in kinds]
    for count in range(1, max((len(p) for p in parts), default=0) + 1):
        names = [".".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return list(kinds)
