"""What is made of the results of the study `robustness`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pocketllm.studies.noise import Difference
from pocketllm.studies.scored import (
    able,
    about_probability,
    accuracy,
    counted_tasks,
    points_lost,
    probability_lost,
)
from pocketllm.studies.study import Results, Table
from pocketllm.studies.style import COLOURS, GREY, MARKERS, mean, number, plain_ticks, with_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_BRITTLE = 2.0  # times the dense perplexity
_PAPER_LOST = {"plain-8x": -0.66, "plain-10x": 0.22, "plain-16x": 3.68}
"""Points: 64.29 of the dense model less the means that the study's claim names."""
_STYLES = {"plain": "--", "calibrated": "-"}


def _keys(results: Results, path: str | None = None, files: bool | None = None) -> list[str]:
    """Keys of the compressions of a path, by falling bits per weight."""
    found = [key for key in results if key != "dense"]
    if path is not None:
        found = [key for key in found if key.split("-")[0] == path]
    if files is not None:
        found = [key for key in found if ("-files-" in key) is files]
    return sorted(found, key=lambda key: -results[key]["bpw_matrices"]) if path is not None else found


def _dense(results: Results) -> dict[str, float]:
    """Text -> the dense model's perplexity, where that is finite: without it nothing can be compared."""
    return {t: value for t, value in results["dense"]["perplexity"].items() if value is not None}


def _factor(results: Results, key: str) -> float | None:
    """Geometric mean over the texts of perplexity over that of the dense model."""
    own = results[key]["perplexity"]
    middle = mean([None if own[t] is None else math.log(own[t] / v) for t, v in _dense(results).items()])
    return None if middle is None else math.exp(middle)


def _lost(results: Results, key: str) -> Difference:
    return points_lost(results["dense"]["tasks"], results[key]["tasks"])


def _probability(results: Results, key: str) -> Difference | None:
    return probability_lost(results["dense"]["tasks"], results[key]["tasks"])


def tables(results: Results) -> list[Table]:
    found = [_perplexities(results)]
    return [*found, _tasks(results)] if results["dense"]["tasks"] else found


def _sizes(values: Mapping[str, Any]) -> list[str]:
    return [
        number(values["bpw_matrices"]),
        f"{number(values['ratio_matrices_fp32'])} / {number(values['ratio_files_bf16'])}",
        number(values["bytes_on_disk"] / 1e6),
    ]


def _perplexities(results: Results) -> Table:
    dense = results["dense"]
    rows = [["dense", "16", "2 / 1", "", "", *(number(v, 4) for v in dense["perplexity"].values()), "1"]]
    for key in _keys(results):
        values = results[key]
        shown = [number(values["perplexity"][text], 4) for text in dense["perplexity"]]
        rows.append([key, *_sizes(values), number(values["nmse"]), *shown, number(_factor(results, key))])
    header = ["", "bpw", "x smaller: matrices, fp32 / files, bf16", "MB", "nmse"]
    note = (
        f"The first {dense['windows']} windows of {dense['context']} tokens of each text. Last column: perplexity "
        "over that of the dense model, geometric mean over the texts. bpw: of the compressed matrices, everything "
        "counted; MB are 10^6 bytes of all files."
    )
    return Table("Perplexity", [*header, *dense["perplexity"], "times dense"], rows, note)


def _tasks(results: Results) -> Table:
    dense = results["dense"]
    counted = counted_tasks(dense["tasks"])
    guessed, best = (accuracy(dense["tasks"], which, counted) for which in ("chance", "acc"))
    names, margin = list(dense["tasks"]), best - guessed
    rows = [["dense", "16", *_percents(dense, names), number(100 * best), "", "", ""]]
    for key in _keys(results):
        values, lost, likely = results[key], _lost(results, key), _probability(results, key)
        mean_of = accuracy(values["tasks"], names=counted)
        rows.append(
            [
                *(key, number(values["bpw_matrices"]), *_percents(values, names), number(100 * mean_of)),
                with_error(lost.value, lost.error, 2),
                f"{number(100 * (mean_of - guessed) / margin, 2)} %" if margin > 0 else "none to keep",
                "" if likely is None else with_error(likely.value, likely.error, 2),
            ]
        )
    note = (
        f"Accuracy in %, the first {dense['limit']} documents of each task; guessing gets "
        f"{number(100 * guessed)} on average of {', '.join(counted)}, over which mean and margin kept (share of the "
        f"dense model's margin over guessing) are taken. {about_probability(dense['tasks'])} ± standard errors of the "
        "differences, paired by document."
    )
    header = ["", "bpw", *names, "mean", "points lost", "margin kept", "probability lost"]
    return Table("Zero-shot tasks", header, rows, note)


def _percents(values: Mapping[str, Any], names: list[str]) -> list[str]:
    return [number(100 * values["tasks"][name]["acc"]) for name in names]


def draw(results: Results, figure: Figure) -> None:
    tasks = results["dense"]["tasks"]
    panels = 1 + bool(tasks) + bool(able(tasks))
    figure.set_size_inches(5 + 4 * (panels - 1), 4.2)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for path, style in _STYLES.items():
        _draw_perplexity(results, axes[0], path, style)
    axes[0].set_yscale("log")
    axes[0].axhline(_BRITTLE, color=GREY, linewidth=1)
    beside = {"transform": axes[0].get_yaxis_transform(), "va": "top", "ha": "right", "fontsize": 7}
    axes[0].text(0.99, _BRITTLE, f"{_BRITTLE:g} times: brittle from here on", **beside)
    axes[0].set_title("perplexity over the dense model's", fontsize=9)
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(fontsize=7, frameon=False, handlelength=3.5)
    plain_ticks(axes[0].yaxis)
    if tasks:
        _draw_accuracy(results, axes[1])
    if able(tasks):
        _draw_probability(results, axes[2])
    for each in axes:
        each.invert_xaxis()
        each.set_xlabel("bits per weight of the compressed matrices", fontsize=8)
        each.tick_params(labelsize=8)
        each.spines[["top", "right"]].set_visible(False)


def _draw_perplexity(results: Results, axes: Any, path: str, style: str) -> None:
    """A line for each text at the paper's ratios, hollow markers on the plain path; squares: of whole files."""
    for n, (text, dense) in enumerate(_dense(results).items()):
        keys = [k for k in _keys(results, path, False) if results[k]["perplexity"][text] is not None]
        if not keys:
            continue
        values = [results[key]["perplexity"][text] / dense for key in keys]
        bits = [results[key]["bpw_matrices"] for key in keys]
        look = {"color": COLOURS[n % len(COLOURS)], "marker": MARKERS[n % len(MARKERS)], "markersize": 4}
        face = "white" if path == "plain" else COLOURS[n % len(COLOURS)]
        axes.plot(bits, values, style, **look, markerfacecolor=face, label=f"{path}: {text}")
    files = [key for key in _keys(results, path, True) if _factor(results, key) is not None]
    if files:
        fill = "white" if path == "plain" else "black"
        look = {"marker": "s", "linestyle": "", "color": fill, "markeredgecolor": "black"}
        bits, values = [results[k]["bpw_matrices"] for k in files], [_factor(results, k) for k in files]
        axes.plot(bits, values, **look, label=f"{path}: whole files, mean of texts")


def _draw_accuracy(results: Results, axes: Any) -> None:
    names = counted_tasks(results["dense"]["tasks"])

    def mean_of(key: str, which: str = "acc") -> float:
        return 100 * accuracy(results[key]["tasks"], which, names)

    _draw_paths(results, axes, mean_of, lambda key: _lost(results, key))
    axes.axhline(mean_of("dense"), color="black", linewidth=1, label="dense")
    axes.axhline(mean_of("dense", "chance"), color=GREY, linewidth=1, label="guessing")
    axes.set_title(f"mean accuracy, %\n({', '.join(names)})", fontsize=9)
    axes.legend(fontsize=8, frameon=False)


def _draw_probability(results: Results, axes: Any) -> None:
    lost = {key: each for key in _keys(results) if (each := _probability(results, key)) is not None}
    _draw_paths(results, axes, lambda key: lost[key].value, lost.__getitem__)
    axes.axhline(0, color="black", linewidth=1)
    axes.set_title(
        f"probability of right answers lost, points\n({', '.join(able(results['dense']['tasks']))})",
        fontsize=9,
    )


def _draw_paths(
    results: Results, axes: Any, value: Callable[[str], float], noise: Callable[[str], Difference]
) -> None:
    """A line for each path over bits, with intervals."""
    for path, style, colour in (("plain", "--o", COLOURS[1]), ("calibrated", "-s", COLOURS[0])):
        keys = _keys(results, path)
        if keys:
            bits, errors = [results[k]["bpw_matrices"] for k in keys], [noise(k).margin for k in keys]
            look = {"fmt": style, "color": colour, "markersize": 4, "capsize": 2, "label": path}
            axes.errorbar(bits, [value(k) for k in keys], errors, **look)


def findings(results: Results) -> list[str]:
    with_tasks = bool(results["dense"]["tasks"])
    sentences = [_claim(results), _likely(results)] if with_tasks else [_untested(results)]
    for path in _STYLES:
        keys = _keys(results, path)
        if keys:
            sentences.append(_brittle(results, path, keys))
    sentences += [_by_text(results)]
    return sentences


def _claim(results: Results) -> str:
    """Points that the published method loses here, held against those that the paper's figures lose."""
    losses = {key: _lost(results, key) for key in _keys(results) if "-files-" not in key}
    told, more = [], []
    for key, lost in losses.items():
        paper = _PAPER_LOST.get(key)
        told.append(
            f"{key} {with_error(lost.value, lost.error, 2)}{'' if paper is None else f' ({paper:g})'}"
        )
        if paper is not None:
            over = replace(lost, value=lost.value - paper)
            more += [key] if over.clear and over.value > 0 else []
    tested = [key for key in losses if key in _PAPER_LOST]
    rest = [key for key in tested if key not in more]
    verdict = (
        "Not contradicted here" if not more else "Did not hold here" if not rest else "Held in part here"
    )
    counted = ", ".join(counted_tasks(results["dense"]["tasks"]))
    words = [f"more than the paper's figures is lost at {', '.join(more)}" if more else ""]
    words += [f"at {', '.join(rest)} noise does not tell the loss from the paper's" if rest else ""]
    return (
        f"{verdict}, on this model and without the paper's fine-tuning: {'; '.join(w for w in words if w)}. Points of "
        f"accuracy lost, mean of {counted} (in brackets the paper's, of fine-tuned models and five tasks): "
        f"{'; '.join(told)}."
    )


def _likely(results: Results) -> str:
    """What the right answers lose: it sees losses that are within the noise of accuracy."""
    names = able(results["dense"]["tasks"])
    if not names:
        return "The dense model does no better than guessing at any of the tasks, so that they say little."
    found = {key: _probability(results, key) for key in _keys(results)}
    lost = {key: each for key, each in found.items() if each is not None}
    listed = "; ".join(f"{key} {with_error(each.value, each.error, 2)}" for key, each in lost.items())
    clear = [key for key, each in lost.items() if each.clear and each.value > 0]
    return (
        f"Smaller losses show in the probability of the right answers at {', '.join(names)}, which the dense model can "
        f"do; in points: {listed}. Lost beyond noise: {', '.join(clear) if clear else 'nothing'}."
    )


def _untested(results: Results) -> str:
    """Without tasks there is no verdict; how near the published method comes on text."""
    words = "Not tested: the claim is about zero-shot tasks, and none was measured."
    factors = {key: _factor(results, key) for key in _keys(results, "plain", False)}
    known = {key: value for key, value in factors.items() if value is not None}
    if not known:
        return words
    best = min(known, key=lambda key: known[key])
    return (
        f"{words} On text the published method comes at best to {number(known[best])} times the dense model's "
        f"perplexity ({best})."
    )


def _brittle(results: Results, path: str, keys: list[str]) -> str:
    """keys: by falling bits."""
    if not _dense(results):
        return f"{path.capitalize()}: the dense model's perplexity is not finite, so that nothing can be compared."
    factors = {key: _factor(results, key) for key in keys}
    listed = "; ".join(f"{key} {number(value)}" for key, value in factors.items())
    broken = next((k for k, value in factors.items() if value is None or value > _BRITTLE), None)
    if broken is None:
        where = (
            f"none of the settings more than doubles it, down to {number(results[keys[-1]]['bpw_matrices'])}"
        )
    else:
        bits = f"{number(results[broken]['bpw_matrices'])} bits per weight ({broken})"
        where = f"it more than doubles from {bits} on"
        if broken == keys[0]:
            where = f"it has more than doubled already at the most bits tried, {bits}"
    return f"{path.capitalize()}: perplexity over the dense model's is {listed}; {where}."


def _by_text(results: Results) -> str:
    """Which text suffers most and least at each setting whose perplexities are all finite."""
    dense = _dense(results)
    if len(results["dense"]["perplexity"]) < 2:
        text = next(iter(results["dense"]["perplexity"]))
        return f"Measured on one text ({text}); no others were found, so nothing is said of other kinds."
    words = []
    for key in _keys(results):
        own = results[key]["perplexity"]
        if not dense or any(own[text] is None for text in dense):
            continue
        factors = {text: own[text] / value for text, value in dense.items()}
        worst, best = max(factors, key=factors.__getitem__), min(factors, key=factors.__getitem__)
        words.append(f"{key} {number(factors[best])} ({best}) to {number(factors[worst])} ({worst})")
    if not words:
        return "By text nothing can be said: at every setting a perplexity is not finite."
    return f"By text, least to most times the dense perplexity: {'; '.join(words)}."
