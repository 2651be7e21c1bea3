"""Numbers of the tables and picture of the study `depth`."""

from __future__ import annotations

from functools import partial
from typing import Any

from pocketllm.studies.claims.depth_claim import group, start_of
from pocketllm.studies.definition import Results
from pocketllm.studies.measure.depth_steps import DEPTHS
from pocketllm.studies.measure.over_seeds import exploded
from pocketllm.studies.measure.trials import TRAINING_TICKS, TRAININGS
from pocketllm.studies.show.plot import DASHES, Axis, Line, Panel, Part, Picture, look, mean_points

_GUARDED = "published start, guarded"


def table_numbers(results: Results) -> dict[str, Any]:
    """For the tables: where training starts, widths, learning rates and lengths, in order."""
    widths, tuned = group(results, "hidden").items(), group(results, "tuned").items()
    return {
        "trainings": TRAININGS,
        "depths": DEPTHS,
        "start_of": partial(start_of, results),
        "exploded": exploded,
        "widths": sorted((int(width), int(depth), entry) for (depth, width), entry in widths),
        "tuned": sorted(
            (int(times), float(rate), int(depth), entry) for (depth, times, rate), entry in tuned
        ),
    }


def picture(results: Results) -> Picture:
    """By start; by width; by learning rate and length."""
    lengths = sorted({int(length) for _, length, _ in group(results, "tuned")})
    rates = sorted({float(rate) for _, _, rate in group(results, "tuned")})
    longer = f"; dashed: {lengths[-1]} times longer" if len(lengths) > 1 else ""
    starts, widths, tuned = (
        [line for n, depth in enumerate(DEPTHS) for line in lines(results, n, depth)]
        for lines in (_starts, _widths, _tuned)
    )
    row = [
        Panel(
            "by start",
            starts,
            x=Axis(ticks=range(len(TRAININGS)), names=TRAINING_TICKS),
            y=Axis("nmse at the end; mean ± standard deviation"),
            legend={"fontsize": 9},
        ),
        Panel(
            f"by hidden width, {_GUARDED}",
            widths,
            x=Axis("hidden width", "log2", sorted({int(width) for _, width in group(results, "hidden")})),
        ),
        Panel(f"by learning rate, {_GUARDED}", tuned, x=Axis(f"learning rate{longer}", "log", rates)),
    ]
    return Picture(13, 4.4, [Part([row], level=True)])


def _starts(results: Results, n: int, depth: int) -> list[Line]:
    """Dots beside each other at the place of each start; the first of a depth is named."""
    named = f"{depth} block{'s' if depth > 1 else ''}"
    return [
        mean_points(
            {place + 0.15 * (n - 1): start_of(results, name, depth)["end_nmse"]},
            look(n, linestyle="none"),
            None if place else named,
        )
        for place, name in enumerate(TRAININGS)
    ]


def _widths(results: Results, n: int, depth: int) -> list[Line]:
    found = {w: e["end_nmse"] for (d, w), e in group(results, "hidden").items() if d == str(depth)}
    return [_line(found, n, "-")]


def _tuned(results: Results, n: int, depth: int) -> list[Line]:
    """A line for each length."""
    entries = group(results, "tuned")
    return [
        _line(
            {r: e["end_nmse"] for (d, t, r), e in entries.items() if (d, t) == (str(depth), times)}, n, dash
        )
        for times, dash in zip(sorted({t for _, t, _ in entries}, key=int), DASHES, strict=False)
    ]


def _line(found: dict[str, list[float | None]], n: int, dash: object) -> Line:
    points = sorted((float(x), values) for x, values in found.items())
    return mean_points(dict(points), look(n, linestyle=dash))
