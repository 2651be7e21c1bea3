"""Pictures as data: panels of marks with axes and legends, and the function that draws them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pocketllm.report import Mark as Mark, mark as mark
from pocketllm.studies.measure.entries import Entry
from pocketllm.studies.measure.significance import Difference, mean, spread

Style = Mapping[str, Any]
"""Keywords of a matplotlib function."""
INK, GREY = "#1b1c20", "#c6cad2"
# Okabe and Ito's, which dichromats can distinguish, and two more; markers and dashes repeat the distinction.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK, "#8c510a")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (7, 2, 1, 2)), (0, (3, 3)))


def look(number: int, **changes: Any) -> dict[str, Any]:
    """Colour, marker and dash of the series of that number, with some of it changed."""
    n = number % len(COLOURS)
    style = {"color": COLOURS[n], "marker": MARKERS[n], "linestyle": DASHES[n], "markersize": 4.5}
    return {**style, **changes}


def series(entries: Sequence[Entry], x: str, y: str, style: Style, label: str | None = None) -> Mark:
    """A line through the values that entries have at two keys."""
    return mark(
        "plot", [entry[x] for entry in entries], [entry[y] for entry in entries], label=label, **style
    )


def mean_points(
    points: Mapping[float, Sequence[float | None]], style: Style, label: str | None = None
) -> Mark:
    """Mean and standard deviation at each x; none where a value is None."""
    known = {x: values for x, values in points.items() if mean(values) is not None}
    middles, spreads = ([how(values) or 0.0 for values in known.values()] for how in (mean, spread))
    return mark("errorbar", list(known), middles, spreads, label=label, capsize=3, **style)


def mean_series(entries: Sequence[Entry], x: str, y: str, style: Style) -> Mark:
    """`mean_points` of the values that entries have at y, in the order of the numbers at x."""
    return mean_points(dict(sorted((float(entry[x]), entry[y]) for entry in entries)), style)


def dots(groups: Mapping[str, Sequence[Sequence[float | None]]]) -> list[Mark]:
    """Name -> the values at place 0, 1, …: mean and standard deviation, the groups side by side at each place."""
    return [
        mean_points({place + 0.15 * (n - 1): values}, look(n, linestyle="none"), None if place else name)
        for n, (name, places) in enumerate(groups.items())
        for place, values in enumerate(places)
    ]


def interval_bars(
    places: Sequence[Any], found: Sequence[Difference], upright: bool = False, **style: Any
) -> Mark:
    """Bars with intervals; no whisker where the error is unknown. whiskers: their width."""
    margins = [each.margin if each.known and not math.isnan(each.value) else 0.0 for each in found]
    method, error = ("bar", "yerr") if upright else ("barh", "xerr")
    style |= {error: margins, "error_kw": {"ecolor": INK, "capsize": 2, "lw": style.pop("whiskers", 1)}}
    return mark(method, places, [each.value for each in found], **style)


@dataclass(frozen=True)
class Axis:
    """An axis of a panel.

    scale: `linear`, `log` or `log2`; minor: whether minor ticks of a logarithmic one carry numbers, too.
    ticks, names: where the ticks are and what they say. low, high: limits. margin: beyond the marks, as a share.
    """

    label: str = ""
    scale: str = "linear"
    ticks: Sequence[float] | None = None
    names: Sequence[str] | None = None
    low: float | None = None
    high: float | None = None
    margin: float | None = None
    minor: bool = False
    reverse: bool = False


LINEAR = Axis()


@dataclass(frozen=True)
class Legend:
    """patches: (colour, words); the labels of the first panel's marks where there are none. style: of matplotlib."""

    style: Style
    patches: Sequence[tuple[str, str]] = ()


@dataclass(frozen=True)
class Panel:
    """marks: in the order they are drawn. legend: its style; None for no legend. small: smaller type."""

    title: str
    marks: Sequence[Mark]
    x: Axis = LINEAR
    y: Axis = LINEAR
    legend: Style | None = None
    title_size: float | None = None
    small: bool = False


@dataclass(frozen=True)
class Part:
    """Rows of panels with a common legend below. level: whether all have the y axis from 0 to the highest top."""

    rows: Sequence[Sequence[Panel]]
    widths: Sequence[float] | None = None
    legend: Legend | None = None
    level: bool = False


@dataclass(frozen=True)
class Picture:
    """width, height: in inches. parts: from the top down. heights: of the parts, in proportion."""

    width: float
    height: float
    parts: Sequence[Part]
    heights: Sequence[float] | None = None


def draw(picture: Picture, figure: Any) -> None:
    """Draw into an empty matplotlib figure."""
    figure.set_size_inches(picture.width, picture.height)
    if len(picture.parts) == 1:
        places = [figure]
    else:
        places = list(figure.subfigures(len(picture.parts), 1, height_ratios=picture.heights))
    for part, place in zip(picture.parts, places, strict=True):
        _draw_part(part, place)


def _draw_part(part: Part, place: Any) -> None:
    grid = place.subplots(len(part.rows), len(part.rows[0]), squeeze=False, width_ratios=part.widths)
    for row, axes_row in zip(part.rows, grid, strict=True):
        for panel, axes in zip(row, axes_row, strict=True):
            _draw_panel(panel, axes)
    if part.level:
        top = max(axes.get_ylim()[1] for axes in grid.flat)
        for axes in grid.flat:
            axes.set_ylim(0, top)
    if part.legend is not None:
        handles, labels = grid[0][0].get_legend_handles_labels()
        if part.legend.patches:
            from matplotlib.patches import Patch

            handles = [Patch(color=colour) for colour, _ in part.legend.patches]
            labels = [words for _, words in part.legend.patches]
        style = {"loc": "outside lower center", "ncols": len(labels), "frameon": False, **part.legend.style}
        place.legend(handles, labels, **style)


def _draw_panel(panel: Panel, axes: Any) -> None:
    for each in panel.marks:
        each.draw(axes)
    _set_axis(axes, "x", panel.x)
    _set_axis(axes, "y", panel.y)
    if panel.small:
        axes.tick_params(labelsize=8)
    size = {"fontsize": 8} if panel.small else {}
    axes.set_xlabel(panel.x.label, **size)
    axes.set_ylabel(panel.y.label, **size)
    axes.set_title(panel.title, fontsize=panel.title_size or (9 if panel.small else 11))
    if panel.legend is not None and axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, **panel.legend)


def _set_axis(axes: Any, which: str, axis: Axis) -> None:
    def call(name: str, *values: Any, **more: Any) -> None:
        getattr(axes, name.format(which))(*values, **more)

    if axis.scale != "linear":
        call("set_{}scale", "log", base=2 if axis.scale == "log2" else 10)
    if axis.ticks is not None:
        call("set_{}ticks", axis.ticks, axis.names)
    if axis.scale != "linear":
        _plain_ticks(getattr(axes, f"{which}axis"), axis.minor)
    if axis.margin is not None:
        axes.margins(**{which: axis.margin})
    if axis.low is not None or axis.high is not None:
        call("set_{}lim", axis.low, axis.high)
    if axis.reverse:
        call("invert_{}axis")


def _plain_ticks(axis: Any, minor: bool) -> None:
    """Numbers on a logarithmic axis as people write them: 0.01, 4096, 10⁻⁸."""
    axis.set_major_formatter(lambda value, _: _plain(value))
    axis.set_minor_formatter(lambda value, _: _plain(value) if minor else "")


def _plain(value: float) -> str:
    power = round(math.log10(value)) if value > 0 else 0
    if value > 0 and not -4 < power < 5 and math.isclose(value, 10.0**power, rel_tol=1e-6):
        return "10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{value:.5g}"
