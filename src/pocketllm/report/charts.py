"""The charts of a report. Each comes with what it shows in words and with its numbers as a table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pocketllm.report import svg

Cell = str
_CHARACTER, _PADDING = 8, 12  # pixels of a table on the page
_PHONE, _HALF_A_PAGE = 320, 400
_TICKS = 5  # on a scale of colours
_KINDS_AT_ONCE = 8  # columns of a heat map that a phone can show with numbers in the cells


@dataclass(frozen=True)
class Table:
    """Headers and rows of text. words: how many columns at the left are words, not numbers."""

    caption: str
    headers: tuple[str, ...]
    rows: Sequence[tuple[Cell, ...]]
    words: int = 1

    @property
    def may_scroll(self) -> bool:
        """Whether it may be wider than a phone, and has to be reached by keyboard to be scrolled."""
        return self._least_pixels > _PHONE

    @property
    def wide(self) -> bool:
        """Whether it may be wider than half a page, and must not stand beside something else."""
        return self._least_pixels > _HALF_A_PAGE

    @property
    def _least_pixels(self) -> float:
        """About what the page needs for it, rather more than less: columns of words may be broken, numbers not."""
        total = 0.0
        for column, cells in enumerate(zip(self.headers, *self.rows, strict=True)):
            pieces = [piece for cell in cells for piece in (cell.split() if column < self.words else [cell])]
            total += _PADDING + _CHARACTER * max(map(len, pieces), default=0)
        return total


@dataclass(frozen=True)
class Chart:
    """A picture with its description (for those who do not see it) and the numbers behind it.

    pictures: one SVG or several below one another. note: a line of text above them.
    """

    name: str
    title: str
    description: str
    pictures: list[str]
    table: Table
    note: str = ""


def short(value: float | None, digits: int = 3) -> str:
    """A number of so many digits, without an exponent where it can be; a dash for None."""
    if value is None:
        return "–"
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(abs(value))))}f}" if value else "0"


def bars(name: str, labels: Sequence[str], values: Sequence[float], notes: Sequence[str]) -> str:
    """Horizontal bars from the top down, each with its label above and `notes` at its end."""
    with svg.drawing():
        figure = svg.new_figure(12 + 36 * len(labels))
        axes = figure.subplots()
        rows = range(len(labels))
        axes.barh(rows, values, height=0.42, color=svg.FIRST)
        most = max([*values, 1e-12])
        for row, label, value, note in zip(rows, labels, values, notes, strict=True):
            axes.text(0, row - 0.3, label, va="bottom", ha="left")
            axes.text(value + 0.01 * most, row, f" {note}", va="center", ha="left")
        axes.set_xlim(0, most * 1.6)
        axes.set_ylim(len(labels) - 0.5, -0.85)
        axes.set_axis_off()
        return svg.inline(figure, name)


def heat_map(name: str, grid: Sequence[Sequence[float | None]], kinds: Sequence[str], unit: str) -> list[str]:
    """Blocks downwards, kinds to the right, the number in each cell; a colour scale that dichromats see.

    Args:
        grid: [blocks][kinds], None where nothing is compressed. unit: what the numbers are.

    Returns:
        One SVG for every eight kinds, with a common scale.
    """
    values = [v for row in grid for v in row if v is not None]
    if not values:
        return []
    if 0 <= min(values) < 1e-3 and max(values) > 0:  # shorter in thousandths
        grid = [[None if v is None else 1000 * v for v in row] for row in grid]
        values, unit = [1000 * v for v in values], f"{unit}, thousandths"
    labels = short_kinds(kinds)
    pictures = []
    for start in range(0, len(kinds), _KINDS_AT_ONCE):
        part = slice(start, start + _KINDS_AT_ONCE)
        cells = [list(row[part]) for row in grid]
        pictures.append(_panel(f"{name}-{start}", cells, labels[part], unit, (min(values), max(values))))
    return pictures


def _panel(
    name: str,
    grid: list[list[float | None]],
    labels: list[str],
    unit: str,
    bounds: tuple[float, float],
) -> str:
    with svg.drawing():
        import numpy as np

        height = 15 * len(grid) + 6.5 * max(len(label) for label in labels) + 70
        figure = svg.new_figure(height)
        axes = figure.subplots()
        numbers = np.array([[math.nan if v is None else v for v in row] for row in grid])
        scale: Any = axes.pcolormesh(
            np.ma.masked_invalid(numbers), cmap="cividis", norm=_norm(bounds), edgecolor="none", linewidth=0
        )
        digits = 3 if bounds[0] >= 0.01 else 2
        for row, line in enumerate(grid):
            for column, value in enumerate(line):
                colour = svg.MUTED if value is None else _readable_on(scale.to_rgba(value))
                axes.text(
                    column + 0.5,
                    row + 0.5,
                    short(value, digits),
                    ha="center",
                    va="center_baseline",
                    fontsize=9,
                    color=colour,
                )
        axes.set_ylim(len(grid), 0)
        axes.xaxis.tick_top()
        axes.set_xticks([n + 0.5 for n in range(len(labels))], labels, rotation=90)
        step = max(1, len(grid) // 16)
        axes.set_yticks(
            [n + 0.5 for n in range(0, len(grid), step)], [str(n) for n in range(0, len(grid), step)]
        )
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_ylabel("block")
        _scale(figure, axes, scale, unit)
        return svg.inline(figure, name)


def _norm(bounds: tuple[float, float]) -> Any:
    """Linear, over at least a fifth of the largest value; logarithmic over more than a factor of 20."""
    from matplotlib.colors import LogNorm, Normalize

    low, high = bounds
    if low > 0 and high / low > 20:
        return LogNorm(low, high)
    least = 0.2 * abs(high) or 1.0
    if high - low < least:  # nearly alike: colours that are nearly alike, too
        middle = (low + high) / 2
        return Normalize(middle - least / 2, middle + least / 2)
    return Normalize(low, high)


def _scale(figure: Any, axes: Any, mesh: Any, unit: str) -> None:
    from matplotlib.colors import LogNorm

    bar = figure.colorbar(mesh, ax=axes, orientation="horizontal", aspect=40, pad=0.01)
    logarithmic = isinstance(bar.norm, LogNorm)
    low, high = bar.norm.vmin, bar.norm.vmax
    parts = [part / (_TICKS - 1) for part in range(_TICKS)]
    ticks = [low * (high / low) ** part if logarithmic else low + (high - low) * part for part in parts]
    bar.set_ticks(ticks, labels=[short(tick, 2) for tick in ticks], minor=False)
    bar.minorticks_off()
    bar.outline.set_visible(False)
    bar.set_label(f"{unit}; logarithmic scale" if logarithmic else unit)


def _readable_on(rgba: Sequence[float]) -> str:
    """Black or white, whichever stands out more from the colour (relative luminance as in WCAG)."""
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in rgba[:3]]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"


def short_kinds(kinds: Sequence[str]) -> list[str]:
    """The shortest endings of the names that still tell them apart."""
    parts = [kind.split(".") for kind in kinds]
    for count in range(1, max((len(p) for p in parts), default=0) + 1):
        names = [".".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return list(kinds)


def histogram(name: str, edges: Sequence[float], original: Sequence[float], decoded: Sequence[float]) -> str:
    """Two distributions on the same bins: the original as a filled area, the decoded as a dashed line.

    The area is light enough for the line on it; its edge tells it from the page.
    """
    with svg.drawing():
        figure = svg.new_figure(215)
        axes = figure.subplots()
        area: dict[str, Any] = {"facecolor": (svg.SECOND, 0.4), "edgecolor": svg.SECOND, "linewidth": 1}
        axes.stairs(original, edges, fill=True, label="original", **area)
        axes.stairs(decoded, edges, color=svg.FIRST, linewidth=1.6, linestyle=(0, (3, 1.5)), label="decoded")
        axes.set_ylim(0, 1.28 * max(*original, *decoded))
        axes.set_xlim(edges[0], edges[-1])
        axes.yaxis.set_major_locator(_few_ticks(symmetric=False))
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        axes.set_ylabel("share in a bin")
        axes.xaxis.set_major_locator(_few_ticks())
        axes.tick_params(axis="x", pad=7)  # clear of the lowest label of the other axis
        axes.set_xlabel("weight")
        axes.legend(loc="upper left", frameon=False, ncols=2, borderpad=0, borderaxespad=0.2)
        return svg.inline(figure, name)


def _few_ticks(symmetric: bool = True) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(5, symmetric=symmetric)


def curves(name: str, series: Sequence[tuple[str, Sequence[float]]], axes_labels: tuple[str, str]) -> str:
    """Lines over equal steps from 0 to 100, told apart by their dashes, beside the diagonal.

    Args:
        series: (label, values at 0, …, 100), at most three. axes_labels: (x, y).
    """
    dashes: list[Any] = ["solid", (0, (5, 1.5)), (0, (1.5, 1.2))]
    with svg.drawing():
        figure = svg.new_figure(230 + 17 * (len(series) + 1))
        axes = figure.subplots()
        axes.plot([0, 100], [0, 100], color=svg.MUTED, linewidth=0.8, label="all used alike")
        for (label, values), dash, colour in zip(
            series, dashes, (svg.FIRST, svg.SECOND, svg.INK), strict=False
        ):
            x = [100 * k / (len(values) - 1) for k in range(len(values))]
            axes.plot(x, values, color=colour, linestyle=dash, linewidth=1.8, label=label)
        axes.set_xlabel(axes_labels[0])
        axes.set_ylabel(axes_labels[1])
        axes.set_xlim(0, 100)
        axes.set_ylim(0, 100)
        figure.legend(loc="outside upper left", frameon=False, handlelength=2.6)  # lines may go anywhere
        return svg.inline(figure, name)
