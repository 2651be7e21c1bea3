"""What the study `overfit` shows."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Mapping
from typing import Any

from pocketllm.studies.study import Results, Table
from pocketllm.studies.style import COLOURS, INK, look, number, plain_ticks
from pocketllm.studies.trials import TRAININGS

TARGET = 1e-4
PAPER_BITS = 2.0  # about: d = 8, K = 2^15
TARGETS = {"MSE": TARGET, "RMSE": TARGET**2}  # as mean square errors


def _named(results: Results, what: str) -> dict[str, Mapping[str, Any]]:
    """Key without its first word -> values."""
    return {key.split(".", 1)[1]: value for key, value in results.items() if key.startswith(f"{what}.")}


def tables(results: Results) -> list[Table]:
    """The targets, the trainings, the rates, the twins."""
    return [_targets(results), _trainings(results), _rates(results), _twins(results)]


def _first(results: Results, mse: float) -> Mapping[str, Any] | None:
    """The point of least bits that reaches an error."""
    reached = [p for p in _named(results, "sweep").values() if p["mse"] < mse]
    return min(reached, key=lambda p: p["bpw"]) if reached else None


def _bound(results: Results, bits: float) -> float:
    """The bound's MSE at so many bits: between those kept its logarithm runs straight, past them as at high rates."""
    kept, mse = results["bound"]["bits"], results["bound"]["mse"]
    place = min(max(bisect(kept, bits) - 1, 0), len(kept) - 2)
    if bits > kept[-1]:
        return float(mse[-1] * 4.0 ** (kept[-1] - bits))
    share = (bits - kept[place]) / (kept[place + 1] - kept[place])
    return float(mse[place] ** (1 - share) * mse[place + 1] ** share)


def _over(results: Results, point: Mapping[str, Any]) -> float:
    """The error over the bound at all the bits that the point stores."""
    return float(point["mse"] / _bound(results, point["bpw"]))


def _targets(results: Results) -> Table:
    rows = []
    square = results["bound"]["matrix"]["mean_square"]
    for name, mse in TARGETS.items():
        found = _first(results, mse)
        cells = (
            ["not reached"] * 4
            if found is None
            else [
                f"d = {found['vector_len']}, K = {found['codebook_size']}",
                f"{found['index_bpw']:.2f}",
                f"{found['bpw']:.2f}",
                number(found["mse"] if name == "MSE" else found["mse"] ** 0.5),
            ]
        )
        needed = results["bound"]["impossible_below_bits"][name]
        rows.append([f"{name} < {TARGET:g}", number(mse / square), f"{needed:.2f}", *cells])
    header = ["target", "as nmse", "impossible below, bits", "reached first by", "index bits", "all bits"]
    return Table(
        "Where the target belongs",
        [*header, "error there"],
        rows,
        f"Mean square of the weights: {number(square)}. Impossible below: for independent Gaussian rows with "
        "the scales of these rows, known for nothing. Reached first: the fewest bits of those tried below, "
        "codebook and decoder counted for this matrix alone.",
    )


def _trainings(results: Results) -> Table:
    rows = []
    for key, c in _named(results, "curve").items():
        ours = _named(results, "curve")[f"ours.{c['vector_len']}x{c['codebook_size']}"]
        rows.append(
            [
                str(c["vector_len"]),
                str(c["codebook_size"]),
                TRAININGS[key.split(".")[0]],
                str(c["steps"]),
                f"{c['index_bpw']:.2f}",
                number(c["nmse"]),
                number(c["mse"]),
                number(c["mse"] ** 0.5),
                f"{c['mse'] / ours['mse']:.3f}",
                f"{c['mse'] / c['bound_mse']:.2f}",
            ]
        )
    header = ["d", "K", "training", "steps", "index bits", "nmse", "MSE", "RMSE", "MSE, ours = 1"]
    note = (
        "Row scales are stored. Best state met. The last column: MSE over the least possible for Gaussian rows at "
        "the rate of the indices."
    )
    return Table("Training on it", [*header, "over the bound"], rows, note)


def _rates(results: Results) -> Table:
    rows = []
    for p in sorted(_named(results, "sweep").values(), key=lambda p: p["index_bpw"]):
        rows.append(
            [
                str(p["vector_len"]),
                str(p["codebook_size"]),
                f"{p['index_bpw']:.2f}",
                f"{p['bpw']:.2f}",
                number(p["kmeans_mse"]),
                number(p["mse"]),
                number(p["mse"] ** 0.5),
                number(p["nmse"]),
                f"{p['mse'] / p['bound_mse']:.2f}",
                f"{_over(results, p):.2f}",
            ]
        )
    header = ["d", "K", "index bits", "all bits", "k-means MSE", "codec MSE", "codec RMSE", "codec nmse"]
    header += ["over the bound, index bits", "all bits"]
    note = (
        "No row scales. Codec: look-up form trained from k-means, codebook and decoder in 16 bits; k-means in "
        "32. d = 1: the scalar quantizer of Lloyd and Max. Over the bound: MSE over the least possible for Gaussian "
        "rows, once at the bits of the indices, once at all bits; a codebook that is large for one matrix holds a "
        "part of it itself, so that below 1 at the bits of the indices means nothing."
    )
    return Table("Over the rates", header, rows, note)


def _twins(results: Results) -> Table:
    rows = []
    sweep = _named(results, "sweep")
    for key, twin in _named(results, "twin").items():
        own = sweep.get(key)
        cells = (
            ["", ""] if own is None else [number(own["kmeans_mse"]), f"{own['kmeans_mse'] / twin['mse']:.3f}"]
        )
        rows.append([str(twin["vector_len"]), str(twin["codebook_size"]), number(twin["mse"]), *cells])
    header = ["d", "K", "Gaussian, MSE", "weights, MSE", "weights over Gaussian"]
    return Table("A Gaussian matrix with the same row scales, k-means", header, rows)


def findings(results: Results) -> list[str]:
    """Where the target is reached, where it is impossible, what training reaches at a rate."""
    first = _first(results, TARGETS["MSE"])
    if first is None:
        verdict = "Did not hold here"
    elif first["bpw"] <= PAPER_BITS:
        verdict = "Held"
    else:
        verdict = f"Held with enough codewords, not at the paper's {PAPER_BITS:g} bits per weight"
    found = [_target_words(results, name, mse) for name, mse in TARGETS.items()]
    found[0] = f"{verdict}. {found[0]} {_paper_words(results)}"
    found[-1] += _rounding_words(results)
    sizes = dict.fromkeys(key.split(".")[1] for key in _named(results, "curve"))
    found += [_curve_words(results, size) for size in sizes]
    return [*found, *_twin_words(results), *_level_words(results)]


def _paper_words(results: Results) -> str:
    bound = results["bound"]
    least = dict(zip(bound["bits"], bound["mse"], strict=True))[PAPER_BITS]
    return f"At {PAPER_BITS:g} bits in all no code of Gaussian rows of these scales has an MSE below {number(least)}."


def _rounding_words(results: Results) -> str:
    """Whether the target is finer than the type that weights are kept in."""
    rounding = results["bound"]["bfloat16_rounding_mse"] ** 0.5
    if rounding <= TARGET:
        return ""
    return f" It asks for more than bfloat16 gives: rounding numbers of this size to it costs {number(rounding)}."


def _twin_words(results: Results) -> list[str]:
    pairs = [(_named(results, "sweep").get(key), twin) for key, twin in _named(results, "twin").items()]
    ratios = [own["kmeans_mse"] / twin["mse"] for own, twin in pairs if own is not None]
    if not ratios:
        return []
    return [
        f"k-means leaves {min(ratios):.2f} to {max(ratios):.2f} times the error on these weights that it leaves "
        "on a Gaussian matrix with the same row scales, at the sizes compared."
    ]


def _level_words(results: Results) -> list[str]:
    """Where the weights are no continuous source, and a code may pass the bound."""
    bound, words = results["bound"], []
    points = sorted(_named(results, "sweep").values(), key=lambda p: p["bpw"])
    passing = [p for p in points if _over(results, p) < 1]
    told = f"All bits counted, {len(passing)} of {len(points)} codes pass the bound for Gaussian rows"
    if passing:
        told += f": {', '.join(_pair(p) for p in passing)}"
    levels = bound["distinct_values"]
    if passing and all(p["codebook_size"] >= levels for p in passing):
        told += f". They have a codeword for each of the {levels} different values that the matrix holds"
    by_indices = [p for p in points if p["mse"] < p["bound_mse"] and p not in passing]
    words.append(f"{told}.")
    if by_indices:
        words.append(
            f"At the bits of the indices alone {', '.join(_pair(p) for p in by_indices)} would pass it, too; but "
            "their codebooks, which are not counted then, hold a part of the matrix."
        )
    if bound["levels_of_32"] <= 16:
        bits = math.log2(max(2, bound["levels_of_32"])) + 2 * 16 / 32
        words.append(
            f"These weights have been quantized before: no run of 32 holds more than {bound['levels_of_32']} "
            f"different values. A code that knew the levels would be exact at about {number(bits, 2)} bits per weight, "
            "with a step and an offset of 16 bits for a run, if levels are evenly spaced; none of the codes here "
            "looks for them."
        )
    return words


def _pair(point: Mapping[str, Any]) -> str:
    return (
        f"(d = {point['vector_len']}, K = {point['codebook_size']}; {point['index_bpw']:.2f} bits of indices, "
        f"{point['bpw']:.2f} in all)"
    )


def _target_words(results: Results, name: str, mse: float) -> str:
    needed = results["bound"]["impossible_below_bits"][name]
    first = _first(results, mse)
    if mse >= results["bound"]["matrix"]["mean_square"]:
        return f"{name} below {TARGET:g}: zeros reach it, since the weights are no larger."
    reached = (
        "none of the codes tried reaches it"
        if first is None
        else f"reached from {first['index_bpw']:.2f} bits of indices on (d = {first['vector_len']}, K = "
        f"{first['codebook_size']}; {first['bpw']:.2f} bits with codebook and decoder)"
    )
    return f"{name} below {TARGET:g}: {reached}; impossible below {needed:.2f} bits for Gaussian rows."


def _curve_words(results: Results, size: str) -> str:
    curves = {name: results[f"curve.{name}.{size}"] for name in TRAININGS}
    ours = curves["ours"]
    told = ", ".join(f"{title} {number(curves[name]['mse'] ** 0.5)}" for name, title in TRAININGS.items())
    return (
        f"At {ours['index_bpw']:.2f} bits of indices (d = {ours['vector_len']}, K = {ours['codebook_size']}), one "
        f"training each, the RMSE comes to: {told}; at least {number(ours['bound_mse'] ** 0.5)} for Gaussian rows "
        "at those bits."
    )


def draw(results: Results, figure: Any) -> None:
    """RMSE over training, a panel for each size; MSE over the rate, with the targets and the bound."""
    sizes = list(dict.fromkeys(key.split(".")[1] for key in _named(results, "curve")))
    figure.set_size_inches(6.5 + 4.2 * len(sizes), 5)
    *curves, rates = figure.subplots(1, len(sizes) + 1, width_ratios=[*[1] * len(sizes), 1.45])
    for axes, size in zip(curves, sizes, strict=True):
        _draw_curves(axes, results, size)
    curves[0].set_ylabel("RMSE, in the weights' own units")
    curves[0].legend(fontsize=9, frameon=False)
    _draw_rates(rates, results)


def _draw_curves(axes: Any, results: Results, size: str) -> None:
    for n, (name, title) in enumerate(TRAININGS.items()):
        values = results[f"curve.{name}.{size}"]["mse_over_epochs"]
        x = [(i + 1) / len(values) for i in range(len(values))]
        y = [float("nan") if v is None else v**0.5 for v in values]  # none at the end of one that broke off
        axes.plot(x, y, label=title, **{**look(n), "marker": ""})
    c = results[f"curve.ours.{size}"]
    limit = c["bound_mse"] ** 0.5
    axes.axhline(limit, color=INK, lw=1, ls=":")
    axes.text(1, limit, f"Gaussian bound at {c['index_bpw']:.2f} bits", ha="right", va="bottom", fontsize=8.5)
    axes.set_yscale("log")
    plain_ticks(axes.yaxis, minor=True)
    axes.set_xlabel("share of training")
    axes.set_title(f"training, d = {c['vector_len']}, K = {c['codebook_size']}", fontsize=11)


def _draw_rates(axes: Any, results: Results) -> None:
    bound = results["bound"]
    axes.plot(bound["bits"], bound["mse"], color=INK, lw=1, ls=":", label="Gaussian rows: the bound")
    points = list(_named(results, "sweep").values())
    for n, d in enumerate(sorted({p["vector_len"] for p in points})):
        own = sorted((p for p in points if p["vector_len"] == d), key=lambda p: p["index_bpw"])
        x, y = [p["index_bpw"] for p in own], [p["mse"] for p in own]
        axes.plot(x, y, label=f"d = {d}, indices alone", **look(n))
        axes.plot([p["bpw"] for p in own], y, color=COLOURS[n], marker="x", lw=0, markersize=4.5)
        style = {"color": COLOURS[n], "markerfacecolor": "none", "markersize": 8, "lw": 0}
        axes.plot(x, [p["kmeans_mse"] for p in own], marker="o", **style)
    axes.plot([], [], color="grey", marker="x", lw=0, label="the same, all bits counted")
    axes.plot(
        [], [], marker="o", markersize=8, lw=0, color="grey", markerfacecolor="none", label="k-means alone"
    )
    for name, mse in TARGETS.items():
        axes.axhline(mse, color="grey", lw=1)
        axes.text(0.1, mse, f"{name} = {TARGET:g}", va="bottom", fontsize=8.5)
    axes.set_yscale("log")
    axes.set_xlim(0, max(p["bpw"] for p in points) + 0.5)
    axes.set_ylim(bottom=min([*TARGETS.values(), *(p["mse"] for p in points)]) / 4)
    plain_ticks(axes.yaxis)
    axes.set_xlabel("bits per weight")
    axes.set_ylabel("MSE, in the weights' own units squared")
    axes.set_title("MSE over the rate", fontsize=11)
    axes.legend(fontsize=8.5, frameon=False)
