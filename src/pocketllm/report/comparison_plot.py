"""A comparison as a plot, in PNG and SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pocketllm.errors import ConfigError
from pocketllm.format import check_target, write_atomically
from pocketllm.report import svg
from pocketllm.report.comparison import Comparison
from pocketllm.report.tables import short

_INK, _GREY, _BLUE = "#1b1c20", "#c6cad2", "#0b5fa5"


@dataclass(frozen=True)
class _Panel:
    """A value of every model, None if there is none, and its format."""

    title: str
    values: Sequence[float | None]
    text: Callable[[float], str] = short


def check_picture(output: Path, only_read: Iterable[str | Path] = ()) -> tuple[Path, Path]:
    """The two files of a picture, PNG and SVG, checked before any work. Provisional.

    Args:
        output: a name that ends in .png or .svg; both files are written.
        only_read: folders that they must not be in: those of the models and adapters.

    Raises:
        ConfigError: another suffix. OutputError: one of the two cannot be written, or is in a model.
        ExtraError: matplotlib is not installed.
    """
    svg.need_matplotlib()
    if output.suffix.lower() not in (".png", ".svg"):
        raise ConfigError(f"{output}: wanted a name that ends in .png or .svg; both are written")
    files = output.with_suffix(".png"), output.with_suffix(".svg")
    for path in files:
        check_target(path, only_read)
    return files


def save_picture(comparison: Comparison, output: str | Path) -> tuple[Path, Path]:
    """Write the picture of a comparison: a row for each model; size, error, and perplexity if measured.

    Returns:
        The two files, PNG and SVG.

    Raises:
        ConfigError, OutputError, ExtraError: as `check_picture`.
    """
    folders = [place for m in comparison.models for place in (m.folder, m.adapter) if place]
    files = check_picture(Path(output), folders)
    for path, data in zip(files, draw(comparison), strict=True):
        write_atomically(path, data)
    return files


def draw(comparison: Comparison) -> tuple[bytes, bytes]:
    """The picture of a comparison as (PNG, SVG).

    Raises:
        ExtraError: matplotlib is not installed.
    """
    models = comparison.models
    panels = _panels(comparison)
    with svg.drawing(_INK, _GREY):
        from matplotlib.figure import Figure

        size = 3.2 * len(panels) + 0.09 * max(len(m.name) for m in models), 0.45 * len(models) + 1.2
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        every = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, panel in zip(every, panels, strict=True):
            _draw_panel(axes, panel)
        every[0].set_yticks(range(len(models)), [m.name for m in models])
        every[0].set_ylim(len(models) - 0.5, -0.5)
        dense = comparison.dense_perplexity
        if dense is not None and math.isfinite(dense):
            every[-1].axvline(dense, color=_INK, linestyle="--", linewidth=1, zorder=0)
            every[-1].set_xlabel(f"dashed line: dense, {short(dense, 4)}")
        return svg.png_and_svg(figure, dpi=160)


def _panels(comparison: Comparison) -> list[_Panel]:
    models = comparison.models
    found = [_Panel("MB on disk", [m.bytes_on_disk / 1e6 for m in models])]
    if all(m.nmse_blocks is not None for m in models if m.nmse is not None):
        found.append(_Panel("nmse of the blocks", [m.nmse_blocks for m in models]))
    else:
        found.append(_Panel("nmse", [m.nmse for m in models]))
    measured = [comparison.dense_perplexity, *(m.perplexity for m in models)]
    if any(value is not None for value in measured):
        found.append(_Panel("perplexity", measured[1:], partial(short, digits=4)))
    return found


def _draw_panel(axes: Any, panel: _Panel) -> None:
    """A dot for each model, its number next to it; the title says where the axis is logarithmic."""
    known = [v for v in panel.values if v is not None and math.isfinite(v) and v > 0]
    logarithmic = bool(known) and max(known) / min(known) > 20
    if logarithmic:
        axes.set_xscale("log")
        axes.set_xlim(min(known) / 2, max(known) * (max(known) / min(known)) ** 0.5)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: "")
    else:
        axes.set_xlim(0, 1.4 * max(known, default=1.0))
    for row, value in enumerate(panel.values):
        if value is None or not math.isfinite(value):
            words = "not measured" if value is None else panel.text(value)
            axes.text(0.03, row, words, transform=axes.get_yaxis_transform(), va="center")
            continue
        axes.plot([value], [row], marker="o", color=_BLUE, linestyle="none")
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
        place = {"xytext": (8, 0), "textcoords": "offset points", "va": "center_baseline"}
        axes.annotate(panel.text(value), (value, row), bbox=box, **place)
    axes.set_title(f"{panel.title} (logarithmic)" if logarithmic else panel.title, fontsize=10)
    axes.grid(axis="y", color=_GREY, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
