"""Tables and picture of the study `robustness`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from pocketllm.studies.claims import robustness_claim as claim
from pocketllm.studies.claims.robustness_claim import dense_perplexities, factor, keys_of
from pocketllm.studies.definition import Note, Results, Table
from pocketllm.studies.measure.significance import Difference
from pocketllm.studies.measure.task_scores import able, accuracy, counted_tasks
from pocketllm.studies.show.columns import Columns, figure, on, text
from pocketllm.studies.show.numbers import number, with_error
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

_SIZES: Columns = {
    "bpw": figure("bpw_matrices"),
    "x smaller: matrices, fp32 / files, bf16": lambda v: (
        f"{number(v['ratio_matrices_fp32'])} / {number(v['ratio_files_bf16'])}"
    ),
    "MB": figure("bytes_on_disk", times=1e-6),
    "nmse": figure("nmse"),
}


def tables(results: Results, note: Note) -> list[Table]:
    """Perplexities; zero-shot tasks, where there are any."""
    dense = results["dense"]
    entries = [(key, results[key], results[key]["perplexity"]) for key in keys_of(results)]
    columns = {
        "": text(0),
        **on(1, _SIZES),
        **on(2, {name: figure(name, 4) for name in dense["perplexity"]}),
        "times dense": lambda entry: number(factor(results, entry[0])),
    }
    own = [number(value, 4) for value in dense["perplexity"].values()]
    found = Table.of("Perplexity", entries, columns, note("Perplexity", dense=dense))
    perplexities = found.below(["dense", "16", "2 / 1", "", "", *own, "1"])
    return [perplexities, _tasks(results, note)] if dense["tasks"] else [perplexities]


def _tasks(results: Results, note: Note) -> Table:
    dense, limit = results["dense"]["tasks"], results["dense"]["limit"]
    counted = counted_tasks(dense)
    guessed, best = (accuracy(dense, which, counted) for which in ("chance", "acc"))

    def kept(tasks: Any) -> str:
        """The share of the dense model's margin over guessing."""
        if best <= guessed:
            return "none to keep"
        return f"{number(100 * (accuracy(tasks, names=counted) - guessed) / (best - guessed), 2)} %"

    def likely(key: str) -> str:
        found = claim.likely_lost(results, key)
        return "" if found is None else with_error(found, 2)

    scores: Columns = {
        **{name: lambda tasks, name=name: number(100 * tasks[name]["acc"]) for name in dense},
        "mean": lambda tasks: number(100 * accuracy(tasks, names=counted)),
    }
    entries = [(key, results[key], results[key]["tasks"]) for key in keys_of(results)]
    columns = {
        "": text(0),
        **on(1, {"bpw": figure("bpw_matrices")}),
        **on(2, scores),
        "points lost": lambda entry: with_error(claim.lost(results, entry[0]), 2),
        **on(2, {"margin kept": kept}),
        "probability lost": lambda entry: likely(entry[0]),
    }
    about = note("Tasks", limit=limit, guessed=guessed, counted=counted, able=able(dense))
    own = [cell(dense) for cell in scores.values()]
    return Table.of("Zero-shot tasks", entries, columns, about).below(["dense", "16", *own, "", "", ""])


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
