"""Numbers of the tables and picture of the study `overfit`."""

from __future__ import annotations

from functools import partial
from typing import Any

from pocketllm.studies.claims.overfit_claim import Point, first_below, over_bound, points, sizes
from pocketllm.studies.definition import Results
from pocketllm.studies.measure.overfit_steps import TARGET, TARGETS
from pocketllm.studies.measure.trials import TRAININGS
from pocketllm.studies.show.plot import (
    COLOURS,
    INK,
    Axis,
    Label,
    Line,
    Mark,
    Panel,
    Part,
    Picture,
    Rule,
    look,
)


def table_numbers(results: Results) -> dict[str, Any]:
    """For the tables: targets, trainings, rates, Gaussian twins, and what the bound says of them."""
    return {
        "target": TARGET,
        "targets": TARGETS,
        "bound": results["bound"],
        "trainings": TRAININGS,
        "curves": points(results, "curve"),
        "sweep": points(results, "sweep"),
        "twins": points(results, "twin"),
        "first_below": partial(first_below, results),
        "over_bound": partial(over_bound, results),
    }


def picture(results: Results) -> Picture:
    """RMSE over training, a panel for each size; MSE over the rate, with the targets and the bound."""
    trained = sizes(results)
    curves = [_curve(results, size, first=size == trained[0]) for size in trained]
    widths = [*[1.0] * len(trained), 1.45]
    return Picture(6.5 + 4.2 * len(trained), 5, [Part([[*curves, _rates(results)]], widths)])


def _curve(results: Results, size: str, first: bool) -> Panel:
    marks: list[Mark] = []
    for n, (name, title) in enumerate(TRAININGS.items()):
        values = results[f"curve.{name}.{size}"]["mse_over_epochs"]
        x = [(i + 1) / len(values) for i in range(len(values))]
        y = [float("nan") if v is None else v**0.5 for v in values]  # None at the end of one that broke off
        marks.append(Line(x, y, look(n, marker=""), title))
    ours = results[f"curve.ours.{size}"]
    limit, words = ours["bound_mse"] ** 0.5, f"Gaussian bound at {ours['index_bpw']:.2f} bits"
    marks.append(Rule(limit, {"color": INK, "lw": 1, "ls": ":"}))
    marks.append(Label(words, 1, limit, {"ha": "right", "va": "bottom", "fontsize": 8.5}))
    return Panel(
        f"training, d = {ours['vector_len']}, K = {ours['codebook_size']}",
        marks,
        x=Axis("share of training"),
        y=Axis("RMSE, in the weights' own units" if first else "", "log", minor=True),
        legend={"fontsize": 9} if first else None,
    )


def _rates(results: Results) -> Panel:
    found, bound = list(points(results, "sweep").values()), results["bound"]
    hollow: dict[str, Any] = {"marker": "o", "markerfacecolor": "none", "markersize": 8, "lw": 0}
    dotted = {"color": INK, "lw": 1, "ls": ":"}
    marks: list[Mark] = [Line(bound["bits"], bound["mse"], dotted, "Gaussian rows: the bound")]
    for n, d in enumerate(sorted({p["vector_len"] for p in found})):
        own = sorted((p for p in found if p["vector_len"] == d), key=lambda p: p["index_bpw"])
        crosses = {"color": COLOURS[n], "marker": "x", "lw": 0, "markersize": 4.5}
        marks += [
            _series(own, "index_bpw", "mse", look(n), f"d = {d}, indices alone"),
            _series(own, "bpw", "mse", crosses),
            _series(own, "index_bpw", "kmeans_mse", {**hollow, "color": COLOURS[n]}),
        ]
    marks.append(Line([], [], {"color": "grey", "marker": "x", "lw": 0}, "the same, all bits counted"))
    marks.append(Line([], [], {**hollow, "color": "grey"}, "k-means alone"))
    for name, mse in TARGETS.items():
        marks.append(Rule(mse, {"color": "grey", "lw": 1}))
        marks.append(Label(f"{name} = {TARGET:g}", 0.1, mse, {"va": "bottom", "fontsize": 8.5}))
    lowest = min([*TARGETS.values(), *(p["mse"] for p in found)]) / 4
    return Panel(
        "MSE over the rate",
        marks,
        x=Axis("bits per weight", low=0, high=max(p["bpw"] for p in found) + 0.5),
        y=Axis("MSE, in the weights' own units squared", "log", low=lowest),
        legend={"fontsize": 8.5},
    )


def _series(own: list[Point], x: str, y: str, style: dict[str, Any], label: str | None = None) -> Line:
    return Line([p[x] for p in own], [p[y] for p in own], style, label)
