"""Tables and picture of the study `overfit`."""

from __future__ import annotations

from typing import Any

from pocketllm.studies.claims.overfit_claim import Point, first_below, over_bound, points, sizes
from pocketllm.studies.definition import Note, Results, Table
from pocketllm.studies.measure.overfit_steps import TARGET, TARGETS
from pocketllm.studies.measure.trials import TRAININGS
from pocketllm.studies.show.columns import figure, fixed, text
from pocketllm.studies.show.numbers import number
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

_SIZE = {"d": text("vector_len"), "K": text("codebook_size")}
_TRAINING = {
    **_SIZE,
    "training": text("training"),
    "steps": text("steps"),
    "index bits": fixed("index_bpw"),
    "nmse": figure("nmse"),
    "MSE": figure("mse"),
    "RMSE": lambda p: number(p["mse"] ** 0.5),
    "MSE, ours = 1": lambda p: f"{p['mse'] / p['ours']['mse']:.3f}",
    "over the bound": lambda p: f"{p['mse'] / p['bound_mse']:.2f}",
}
_RATE = {
    **_SIZE,
    "index bits": fixed("index_bpw"),
    "all bits": fixed("bpw"),
    "k-means MSE": figure("kmeans_mse"),
    "codec MSE": figure("mse"),
    "codec RMSE": lambda p: number(p["mse"] ** 0.5),
    "codec nmse": figure("nmse"),
    "over the bound, index bits": lambda p: f"{p['mse'] / p['bound_mse']:.2f}",
    "over the bound, all bits": fixed("over"),
}
_TWIN = {
    **_SIZE,
    "Gaussian, MSE": figure("mse"),
    "weights, MSE": lambda p: number(p["own"]["kmeans_mse"]) if p["own"] else "",
    "weights over Gaussian": lambda p: f"{p['own']['kmeans_mse'] / p['mse']:.3f}" if p["own"] else "",
}


def tables(results: Results, note: Note) -> list[Table]:
    """The targets, the trainings, the rates, the twins."""
    curves, sweep = points(results, "curve"), points(results, "sweep")
    trained = [
        {**c, "training": TRAININGS[name], "ours": curves[f"ours.{size}"]}
        for name, size, c in ((*key.split("."), c) for key, c in curves.items())
    ]
    rates = [
        {**p, "over": over_bound(results, p)} for p in sorted(sweep.values(), key=lambda p: p["index_bpw"])
    ]
    twins = [{**twin, "own": sweep.get(key)} for key, twin in points(results, "twin").items()]
    return [
        _targets(results, note),
        Table.of("Training on it", trained, _TRAINING, note("Trainings")),
        Table.of("Over the rates", rates, _RATE, note("Rates")),
        Table.of("A Gaussian matrix with the same row scales, k-means", twins, _TWIN),
    ]


def _targets(results: Results, note: Note) -> Table:
    square, rows = results["bound"]["matrix"]["mean_square"], []
    for name, mse in TARGETS.items():
        needed = results["bound"]["impossible_below_bits"][name]
        rows.append([f"{name} < {TARGET:g}", number(mse / square), f"{needed:.2f}"])
        found = first_below(results, mse)
        if found is None:
            rows[-1] += ["not reached"] * 4
            continue
        size = f"d = {found['vector_len']}, K = {found['codebook_size']}"
        error = number(found["mse"] if name == "MSE" else found["mse"] ** 0.5)
        rows[-1] += [size, f"{found['index_bpw']:.2f}", f"{found['bpw']:.2f}", error]
    header = ["target", "as nmse", "impossible below, bits", "reached first by", "index bits", "all bits"]
    return Table("Where the target belongs", [*header, "error there"], rows, note("Targets", square=square))


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
