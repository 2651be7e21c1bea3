"""Numbers of the tables and picture of the study `rln`."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from pocketllm.studies.claims.rln_claim import entries_of, learned_nothing, tried
from pocketllm.studies.definition import Results
from pocketllm.studies.measure.over_seeds import EXPLODED, exploded, highest, over_entries
from pocketllm.studies.measure.trials import NORMS, TRAINING_TICKS, TRAININGS
from pocketllm.studies.show.plot import Axis, Line, Panel, Part, Picture, look, mean_points

_SWEEPS = (
    ("rate", "Learning rates", "learning rate", "Published start, not guarded"),
    ("size", "Codebook sizes", "K", "Published start, guarded"),
)


def table_numbers(results: Results) -> dict[str, Any]:
    """For the tables: the entries of a training and a norm, what was tried, and figures over the seeds."""
    return {
        "trainings": TRAININGS,
        "norms": NORMS,
        "entries": partial(entries_of, results),
        "sweeps": _SWEEPS,
        "tried": partial(tried, results),
        "over": over_entries,
        "highest": highest,
        "exploded": exploded,
        "limit": EXPLODED,
    }


def picture(results: Results) -> Picture:
    """Gradients over training; where training ends; gradients by learning rate."""
    numbered = list(enumerate(NORMS.items()))
    gradients = [
        _gradients(entries_of(results, "published", norm), n, title) for n, (norm, title) in numbered
    ]
    ends = [
        mean_points(
            {place + 0.15 * (n - 1): over_entries(entries_of(results, training, norm), "end_nmse")},
            look(n, linestyle="none"),
        )
        for n, (norm, _) in numbered
        for place, training in enumerate(TRAININGS)
    ]
    peaks = [mark for n, (norm, _) in numbered for mark in _peaks(results, norm, n)]
    seeds = len(entries_of(results, "ours", "rln")[0]["seeds"])
    rates = [float(rate) for rate in tried(results, "rate")]
    row = [
        Panel(
            "gradient norm over training",
            gradients,
            x=Axis("share of training, published start\nline: median; band: lowest to highest"),
            y=Axis("gradient norm", "log"),
            legend={"fontsize": 9},
        ),
        Panel(
            f"nmse at the end, {seeds} seeds",
            ends,
            x=Axis(ticks=range(len(TRAININGS)), names=TRAINING_TICKS),
            y=Axis("nmse; mean ± standard deviation", low=0),
        ),
        Panel(
            "highest gradient norm, any seed",
            peaks,
            x=Axis(
                "learning rate, published start\nhollow: most seeds end no better than zeros", "log", rates
            ),
            y=Axis(scale="log"),
        ),
    ]
    return Picture(13, 4.4, [Part([row])])


def _peaks(results: Results, norm: str, n: int) -> list[Line]:
    """The highest gradient at each rate; hollow where training led to nothing, so that it says little of the norm."""
    found = []
    for rate in tried(results, "rate"):
        entry = results[f"rate.{norm}.{rate}"]
        peak = highest([entry], "peak_gradient")
        if peak is not None:
            found.append((float(rate), peak, learned_nothing(entry)))
    hollow = [point for point in found if point[2]]
    styles = look(n), look(n, markerfacecolor="white", linestyle="none")
    return [
        Line([x for x, _, _ in points], [y for _, y, _ in points], style)
        for points, style in zip((found, hollow), styles, strict=True)
    ]


def _gradients(entries: Sequence[Any], n: int, title: str) -> Line:
    known = [entry["gradient"] for entry in entries]
    length = min(len(gradient["middle"]) for gradient in known)

    def across(key: str, how: Callable[[list[float]], float]) -> list[float]:
        """Over kinds; not a number where none of them is finite."""
        columns = [[g[key][i] for g in known if g[key][i] is not None] for i in range(length)]
        return [how(column) if column else float("nan") for column in columns]

    x = [(place + 0.5) / length for place in range(length)]
    band = across("low", min), across("high", max)
    return Line(x, across("middle", statistics.median), look(n, marker=""), title, band=band)
