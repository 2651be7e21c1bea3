"""The charts of a page: each is a frozen specification, drawn by one function, `picture`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pocketllm.report import svg
from pocketllm.report.marks import Mark, mark
from pocketllm.report.tables import Table


class Drawing(Protocol):
    """The specification of one picture."""

    @property
    def height(self) -> float:
        """Height of the figure in points."""

    def draw(self, figure: Any, axes: Any) -> None:
        """Draw on the axes of an empty matplotlib figure."""


@dataclass(frozen=True)
class Chart:
    """Drawings arranged vertically, with their numbers as a table.

    drawings: id on the page -> drawing. facts: values for the description in the section's template.
    """

    name: str
    title: str
    drawings: Mapping[str, Drawing]
    table: Table
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def pictures(self) -> list[str]:
        """One SVG for each drawing."""
        return [picture(drawing, name) for name, drawing in self.drawings.items()]


def picture(drawing: Drawing, name: str) -> str:
    """The drawing as SVG for a page; its ids begin with `name`.

    Raises:
        ExtraError: matplotlib is not installed.
    """
    with svg.drawing():
        figure = svg.new_figure(drawing.height)
        drawing.draw(figure, figure.subplots())
        return svg.inline(figure, name)


@dataclass(frozen=True)
class Marks:
    """A picture of marks alone. legend: of the figure, outside of the axes."""

    height: float
    marks: Sequence[Mark]
    legend: Mapping[str, Any] | None = None

    def draw(self, figure: Any, axes: Any) -> None:
        for each in self.marks:
            each.draw(axes)
        if self.legend is not None:
            figure.legend(**self.legend)


def bars(labels: Sequence[str], values: Sequence[float], notes: Sequence[str]) -> Marks:
    """Horizontal bars from the top down, each with its label above and a note at its end."""
    most = max([*values, 1e-12])
    marks = [mark("barh", range(len(labels)), values, height=0.42, color=svg.FIRST)]
    for row, (label, value, note) in enumerate(zip(labels, values, notes, strict=True)):
        marks.append(mark("text", 0, row - 0.3, label, va="bottom", ha="left"))
        marks.append(mark("text", value + 0.01 * most, row, f" {note}", va="center", ha="left"))
    limits = mark("set", xlim=(0, most * 1.6), ylim=(len(labels) - 0.5, -0.85))
    return Marks(12 + 36 * len(labels), [*marks, limits, mark("set_axis_off")])


def histogram(edges: Sequence[float], original: Sequence[float], decoded: Sequence[float]) -> Marks:
    """Two distributions on the same bins: the original as a filled area, the decoded as a dashed line.

    The area is light enough for the line on it; its edge sets it off from the page.
    """
    from matplotlib.ticker import MaxNLocator

    area: dict[str, Any] = {"facecolor": (svg.SECOND, 0.4), "edgecolor": svg.SECOND, "linewidth": 1}
    line: dict[str, Any] = {"color": svg.FIRST, "linewidth": 1.6, "linestyle": (0, (3, 1.5))}
    legend = {"loc": "upper left", "frameon": False, "ncols": 2, "borderpad": 0, "borderaxespad": 0.2}
    limits = {"xlim": (edges[0], edges[-1]), "ylim": (0, 1.28 * max(*original, *decoded))}
    marks = [
        mark("stairs", original, edges, fill=True, label="original", **area),
        mark("stairs", decoded, edges, label="decoded", **line),
        mark("set", xlabel="weight", ylabel="share per bin", **limits),
        mark("xaxis.set_major_locator", MaxNLocator(5, symmetric=True)),
        mark("yaxis.set_major_locator", MaxNLocator(5, symmetric=False)),
        mark("yaxis.set_major_formatter", lambda share, _: f"{100 * share:g} %"),
        mark("tick_params", axis="x", pad=7),  # clear of the lowest label of the other axis
        mark("legend", **legend),
    ]
    return Marks(215, marks)


def curves(series: Mapping[str, Sequence[float]], x_label: str, y_label: str, diagonal: str) -> Marks:
    """Lines over equal steps from 0 to 100, distinguished by their dashes, and the diagonal.

    series: label -> values at 0, …, 100; at most three.
    """
    styles = {svg.FIRST: "solid", svg.SECOND: (0, (5, 1.5)), svg.INK: (0, (1.5, 1.2))}
    marks = [mark("plot", [0, 100], [0, 100], color=svg.MUTED, linewidth=0.8, label=diagonal)]
    for (label, values), (colour, dash) in zip(series.items(), styles.items(), strict=False):
        x = [100 * k / (len(values) - 1) for k in range(len(values))]
        marks.append(mark("plot", x, values, color=colour, linestyle=dash, linewidth=1.8, label=label))
    marks.append(mark("set", xlabel=x_label, ylabel=y_label, xlim=(0, 100), ylim=(0, 100)))
    legend = {"loc": "outside upper left", "frameon": False, "handlelength": 2.6}  # lines may go anywhere
    return Marks(230 + 17 * (len(series) + 1), marks, legend)
