"""Numbers of the tables and picture of the study `robustness`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from pocketllm.studies.claims import robustness_claim as claim
from pocketllm.studies.claims.robustness_claim import dense_perplexities, factor, keys_of
from pocketllm.studies.definition import Results
from pocketllm.studies.measure.significance import Difference
from pocketllm.studies.measure.task_scores import able, accuracy, counted_tasks
from pocketllm.studies.show.plot import (
    COLOURS,
    GREY,
    MARKERS,
    Axis,
    Label,
    Line,
    Mark,
    Panel,
    Part,
    Picture,
    Rule,
)


def table_numbers(results: Results) -> dict[str, Any]:
    """For the tables: the compressions, and what each loses."""
    return {
        "keys": keys_of(results),
        "counted": counted_tasks(results["dense"]["tasks"]),
        "able": able,
        "accuracy": accuracy,
        "factor": partial(factor, results),
        "lost": partial(claim.lost, results),
        "likely_lost": partial(claim.likely_lost, results),
    }


def picture(results: Results) -> Picture:
    """Perplexity, accuracy and the probability of right answers over bits per weight."""
    tasks = results["dense"]["tasks"]
    panels = [_perplexities(results)]
    if tasks:
        panels.append(_accuracies(results))
    if able(tasks):
        panels.append(_probabilities(results))
    return Picture(1 + 4 * len(panels), 4.2, [Part([panels])])


_BITS = Axis("bits per weight of the compressed matrices", reverse=True)


def _perplexities(results: Results) -> Panel:
    """A line for each text at the paper's ratios, hollow markers on the plain path; squares: of whole files."""
    marks: list[Mark] = []
    for path, dash, face in (("plain", "--", "white"), ("calibrated", "-", "")):
        for n, (name, dense) in enumerate(dense_perplexities(results).items()):
            values = {
                key: own / dense
                for key in keys_of(results, path, files=False)
                if (own := results[key]["perplexity"][name]) is not None
            }
            colour = COLOURS[n % len(COLOURS)]
            look = {"color": colour, "marker": MARKERS[n % len(MARKERS)], "markersize": 4, "linestyle": dash}
            marks += _over_bits(
                results, values, {**look, "markerfacecolor": face or colour}, f"{path}: {name}"
            )
        factors = {key: factor(results, key) for key in keys_of(results, path, files=True)}
        known = {key: value for key, value in factors.items() if value is not None}
        look = {"marker": "s", "linestyle": "", "color": face or "black", "markeredgecolor": "black"}
        marks += _over_bits(results, known, look, f"{path}: whole files, mean of texts")
    words = {"va": "top", "ha": "right", "fontsize": 7}
    marks.append(Rule(claim.BRITTLE, {"color": GREY, "linewidth": 1}))
    named = f"{claim.BRITTLE:g} times: brittle from here on"
    marks.append(Label(named, 0.99, claim.BRITTLE, words, across=True))
    legend = {"fontsize": 7, "handlelength": 3.5}
    return Panel("perplexity over the dense model's", marks, _BITS, Axis(scale="log"), legend, small=True)


def _over_bits(results: Results, values: dict[str, float], style: dict[str, Any], label: str) -> list[Line]:
    """A line over bits per weight; none without points."""
    bits = [results[key]["bpw_matrices"] for key in values]
    return [Line(bits, list(values.values()), style, label)] if values else []


def _accuracies(results: Results) -> Panel:
    names = counted_tasks(results["dense"]["tasks"])

    def mean_of(key: str, which: str = "acc") -> float:
        return 100 * accuracy(results[key]["tasks"], which, names)

    marks = [
        *_paths(results, mean_of, partial(claim.lost, results)),
        Rule(mean_of("dense"), {"color": "black", "linewidth": 1, "label": "dense"}),
        Rule(mean_of("dense", "chance"), {"color": GREY, "linewidth": 1, "label": "guessing"}),
    ]
    title = f"mean accuracy, %\n({', '.join(names)})"
    return Panel(title, marks, _BITS, legend={"fontsize": 8}, small=True)


def _probabilities(results: Results) -> Panel:
    found = {key: each for key in keys_of(results) if (each := claim.likely_lost(results, key)) is not None}
    lines = _paths(results, lambda key: found[key].value, found.__getitem__)
    names = ", ".join(able(results["dense"]["tasks"]))
    marks = [*lines, Rule(0, {"color": "black", "linewidth": 1})]
    return Panel(f"probability of right answers lost, points\n({names})", marks, _BITS, small=True)


def _paths(results: Results, value: Callable[[str], float], noise: Callable[[str], Difference]) -> list[Mark]:
    """A line for each path over bits, with intervals."""
    marks: list[Mark] = []
    for path, style, colour in (("plain", "--o", COLOURS[1]), ("calibrated", "-s", COLOURS[0])):
        keys = keys_of(results, path)
        if keys:
            bits, errors = [results[key]["bpw_matrices"] for key in keys], [noise(key).margin for key in keys]
            look = {"fmt": style, "color": colour, "markersize": 4, "capsize": 2}
            marks.append(Line(bits, [value(key) for key in keys], look, path, errors))
    return marks
