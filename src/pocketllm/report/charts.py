"""The charts of a page: each is a frozen specification, drawn by one function, `picture`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from pocketllm.report import svg
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
class Bars:
    """Horizontal bars from the top down, each with its label above and a note at its end."""

    labels: Sequence[str]
    values: Sequence[float]
    notes: Sequence[str]

    @property
    def height(self) -> float:
        return 12 + 36 * len(self.labels)

    def draw(self, figure: Any, axes: Any) -> None:
        rows = range(len(self.labels))
        axes.barh(rows, self.values, height=0.42, color=svg.FIRST)
        most = max([*self.values, 1e-12])
        for row, label, value, note in zip(rows, self.labels, self.values, self.notes, strict=True):
            axes.text(0, row - 0.3, label, va="bottom", ha="left")
            axes.text(value + 0.01 * most, row, f" {note}", va="center", ha="left")
        axes.set(xlim=(0, most * 1.6), ylim=(len(self.labels) - 0.5, -0.85))
        axes.set_axis_off()


@dataclass(frozen=True)
class Histogram:
    """Two distributions on the same bins: the original as a filled area, the decoded as a dashed line.

    The area is light enough for the line on it; its edge sets it off from the page.
    """

    edges: Sequence[float]
    original: Sequence[float]
    decoded: Sequence[float]
    height: float = 215

    def draw(self, figure: Any, axes: Any) -> None:
        from matplotlib.ticker import MaxNLocator

        area: dict[str, Any] = {"facecolor": (svg.SECOND, 0.4), "edgecolor": svg.SECOND, "linewidth": 1}
        line: dict[str, Any] = {"color": svg.FIRST, "linewidth": 1.6, "linestyle": (0, (3, 1.5))}
        axes.stairs(self.original, self.edges, fill=True, label="original", **area)
        axes.stairs(self.decoded, self.edges, label="decoded", **line)
        most = max(*self.original, *self.decoded)
        axes.set(xlim=(self.edges[0], self.edges[-1]), ylim=(0, 1.28 * most))
        axes.set(xlabel="weight", ylabel="share per bin")
        axes.xaxis.set_major_locator(MaxNLocator(5, symmetric=True))
        axes.yaxis.set_major_locator(MaxNLocator(5, symmetric=False))
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
        axes.tick_params(axis="x", pad=7)  # clear of the lowest label of the other axis
        axes.legend(loc="upper left", frameon=False, ncols=2, borderpad=0, borderaxespad=0.2)


@dataclass(frozen=True)
class Curves:
    """Lines over equal steps from 0 to 100, distinguished by their dashes, and the diagonal.

    series: label -> values at 0, …, 100; at most three.
    """

    series: Mapping[str, Sequence[float]]
    x_label: str
    y_label: str
    diagonal: str

    @property
    def height(self) -> float:
        return 230 + 17 * (len(self.series) + 1)

    def draw(self, figure: Any, axes: Any) -> None:
        styles = {svg.FIRST: "solid", svg.SECOND: (0, (5, 1.5)), svg.INK: (0, (1.5, 1.2))}
        axes.plot([0, 100], [0, 100], color=svg.MUTED, linewidth=0.8, label=self.diagonal)
        for (label, values), (colour, dash) in zip(self.series.items(), styles.items(), strict=False):
            x = [100 * k / (len(values) - 1) for k in range(len(values))]
            axes.plot(x, values, color=colour, linestyle=dash, linewidth=1.8, label=label)
        axes.set(xlabel=self.x_label, ylabel=self.y_label, xlim=(0, 100), ylim=(0, 100))
        figure.legend(loc="outside upper left", frameon=False, handlelength=2.6)  # lines may go anywhere
