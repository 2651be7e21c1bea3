"""At how many bits does the error of one projection fall below 1e-4, and is that possible at the paper's bits?"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Iterator
from typing import Any

from pocketllm.studies.definition import Finding, Results, Values
from pocketllm.studies.measure.entries import Entry, select
from pocketllm.studies.measure.overfit_steps import TARGET, TARGETS
from pocketllm.studies.measure.trials import TRAININGS
from pocketllm.studies.show import plot
from pocketllm.studies.verdicts import Verdict, holds

_PAPER_BITS = 2.0  # approximately: d = 8, K = 2^15
_QUANTIZED = 16  # number of levels in a run of 32 weights above which they were not quantized before


def sweep(results: Results) -> list[Entry]:
    """The codes of all rates; over: the error over the bound at all the bits that are stored.

    The logarithm of the bound's MSE is interpolated, and extrapolated as at high rates.
    """
    kept, mse = results["bound"]["bits"], results["bound"]["mse"]

    def over(point: Entry) -> float:
        bits = point["bpw"]
        if bits > kept[-1]:
            return float(point["mse"] / (mse[-1] * 4.0 ** (kept[-1] - bits)))
        place = min(max(bisect(kept, bits) - 1, 0), len(kept) - 2)
        share = (bits - kept[place]) / (kept[place + 1] - kept[place])
        return float(point["mse"] / (mse[place] ** (1 - share) * mse[place + 1] ** share))

    return [{**point, "over": over(point)} for point in select(results, "sweep.{size}")]


def first_below(results: Results, mse: float) -> Entry | None:
    """The point of least bits that reaches an error."""
    return min((p for p in sweep(results) if p["mse"] < mse), key=lambda p: p["bpw"], default=None)


def _target(results: Results, name: str) -> dict[str, Any]:
    bound = results["bound"]
    return {
        "name": name,
        "target": TARGET,
        "first": first_below(results, TARGETS[name]),
        "zeros": TARGETS[name] >= bound["matrix"]["mean_square"],
        "impossible": bound["impossible_below_bits"][name],
    }


def _mse(results: Results) -> Iterator[Values]:
    least = dict(zip(results["bound"]["bits"], results["bound"]["mse"], strict=True))[_PAPER_BITS]
    yield {"reached": _target(results, "MSE"), "paper_bits": _PAPER_BITS, "least_mse": least}


def _below(values: Values) -> Verdict:
    """In part: reached at more bits than the paper's."""
    first = values["reached"]["first"]
    return Verdict.IN_PART if first and first["bpw"] > _PAPER_BITS else holds(first is not None)


def _rmse(results: Results) -> Iterator[Values]:
    rounding = results["bound"]["bfloat16_rounding_mse"] ** 0.5
    yield {"reached": _target(results, "RMSE"), "rounding": rounding if rounding > TARGET else None}


def _curves(results: Results) -> Iterator[Values]:
    for ours in select(results, "curve.ours.{size}"):
        ends = {title: results[f"curve.{name}.{ours['size']}"]["mse"] for name, title in TRAININGS.items()}
        yield {"ours": ours, "ends": ends}


def _twins(results: Results) -> Iterator[Values]:
    """The error of k-means on the weights over that on a Gaussian matrix."""
    codes = {p["size"]: p["kmeans_mse"] for p in sweep(results)}
    ratios = [codes[p["size"]] / p["mse"] for p in select(results, "twin.{size}") if p["size"] in codes]
    if ratios:
        yield {"ratios": ratios}


def _bound(results: Results) -> Iterator[Values]:
    """The codes that pass the bound with all bits counted."""
    codes, levels = sorted(sweep(results), key=lambda p: p["bpw"]), results["bound"]["distinct_values"]
    passing = [p for p in codes if p["over"] < 1]
    known = bool(passing) and all(p["codebook_size"] >= levels for p in passing)
    yield {"count": len(codes), "passing": passing, "levels": levels if known else None}


def _by_indices(results: Results) -> Iterator[Values]:
    """Those that pass it at the bits of the indices alone."""
    found = [p for p in sweep(results) if p["mse"] < p["bound_mse"] and p["over"] >= 1]
    if found:
        yield {"found": sorted(found, key=lambda p: p["bpw"])}


def _quantized(results: Results) -> Iterator[Values]:
    levels = results["bound"]["levels_of_32"]
    if levels <= _QUANTIZED:
        yield {"levels": levels, "bits": math.log2(max(2, levels)) + 2 * 16 / 32}


FINDINGS = (
    Finding("the error falls below 1e-4, read as an MSE", _mse, _below),
    Finding("the error falls below 1e-4, read as an RMSE", _rmse),
    Finding("where training ends", _curves),
    Finding("the weights against Gaussian ones", _twins),
    Finding("codes that pass the bound", _bound),
    Finding("codes that pass it by their indices", _by_indices),
    Finding("weights that were quantized before", _quantized),
)


def picture(results: Results) -> plot.Picture:
    """RMSE over training, a panel for each size; MSE over the rate, with the targets and the bound."""
    trained = select(results, "curve.ours.{size}")
    curves = [_curve(results, ours, first=not n) for n, ours in enumerate(trained)]
    parts = [plot.Part([[*curves, _rates(results)]], [*[1.0] * len(trained), 1.45])]
    return plot.Picture(6.5 + 4.2 * len(trained), 5, parts)


def _curve(results: Results, ours: Entry, first: bool) -> plot.Panel:
    marks: list[plot.Mark] = []
    for n, (name, title) in enumerate(TRAININGS.items()):
        values = results[f"curve.{name}.{ours['size']}"]["mse_over_epochs"]
        x = [(i + 1) / len(values) for i in range(len(values))]
        y = [float("nan") if v is None else v**0.5 for v in values]  # None at the end of one that broke off
        marks.append(plot.mark("plot", x, y, label=title, **plot.look(n, marker="")))
    limit, words = ours["bound_mse"] ** 0.5, f"Gaussian bound at {ours['index_bpw']:.2f} bits"
    marks.append(plot.mark("axhline", limit, color=plot.INK, lw=1, ls=":"))
    marks.append(plot.mark("text", 1, limit, words, ha="right", va="bottom", fontsize=8.5))
    return plot.Panel(
        f"training, d = {ours['vector_len']}, K = {ours['codebook_size']}",
        marks,
        plot.Axis("share of training"),
        plot.Axis("RMSE, in the weights' own units" if first else "", "log", minor=True),
        {"fontsize": 9} if first else None,
    )


def _rates(results: Results) -> plot.Panel:
    found, bound = sweep(results), results["bound"]
    hollow: dict[str, Any] = {"marker": "o", "markerfacecolor": "none", "markersize": 8, "lw": 0}
    dotted = {"color": plot.INK, "lw": 1, "ls": ":", "label": "Gaussian rows: the bound"}
    marks = [plot.mark("plot", bound["bits"], bound["mse"], **dotted)]
    for n, d in enumerate(sorted({p["vector_len"] for p in found})):
        own = sorted((p for p in found if p["vector_len"] == d), key=lambda p: p["index_bpw"])
        crosses = {"color": plot.COLOURS[n], "marker": "x", "lw": 0, "markersize": 4.5}
        marks += [
            plot.series(own, "index_bpw", "mse", plot.look(n), f"d = {d}, indices alone"),
            plot.series(own, "bpw", "mse", crosses),
            plot.series(own, "index_bpw", "kmeans_mse", {**hollow, "color": plot.COLOURS[n]}),
        ]
    crosses = {"color": "grey", "marker": "x", "lw": 0, "label": "the same, all bits counted"}
    marks.append(plot.mark("plot", [], [], **crosses))
    marks.append(plot.mark("plot", [], [], color="grey", label="k-means alone", **hollow))
    for name, mse in TARGETS.items():
        marks.append(plot.mark("axhline", mse, color="grey", lw=1))
        marks.append(plot.mark("text", 0.1, mse, f"{name} = {TARGET:g}", va="bottom", fontsize=8.5))
    lowest = min([*TARGETS.values(), *(p["mse"] for p in found)]) / 4
    return plot.Panel(
        "MSE over the rate",
        marks,
        plot.Axis("bits per weight", low=0, high=max(p["bpw"] for p in found) + 0.5),
        plot.Axis("MSE, in the weights' own units squared", "log", low=lowest),
        {"fontsize": 8.5},
    )
