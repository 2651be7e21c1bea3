"""Is more accuracy lost than in the paper, where does quality break down, and which text suffers most?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from pocketllm.studies.definition import Finding, Results, Values
from pocketllm.studies.measure.entries import Entry, select
from pocketllm.studies.measure.significance import Difference, mean
from pocketllm.studies.measure.task_scores import able, accuracy, counted_tasks, points_lost, probability_lost
from pocketllm.studies.show import plot
from pocketllm.studies.verdicts import Verdict, above_zero, holds, together

_BRITTLE = 2.0  # times the dense perplexity
_PATHS = ("plain", "calibrated")
_PAPER_LOST = {"plain-8x": -0.66, "plain-10x": 0.22, "plain-16x": 3.68}
"""Points: 64.29 of the dense model less the means that the study's claim names."""


def compressions(results: Results, path: str | None = None) -> list[Entry]:
    """The compressions, with `key`, and `files` where the ratio is that of whole files; or a path by falling bits.

    times: perplexity over the dense model's by text, where that is finite; factor: geometric mean of them; lost:
    points of mean accuracy; likely: points of the right answers' probability. None where there is none.
    """
    perplexity, tasks = results["dense"]["perplexity"], results["dense"]["tasks"]
    known = {text: value for text, value in perplexity.items() if value is not None}
    found: list[Entry] = []
    for entry in select(results, "{path}-{ratio}"):
        times = {t: own and own / known[t] for t, own in entry["perplexity"].items() if t in known}
        middle = mean([own and math.log(own) for own in times.values()])
        more = {
            "key": f"{entry['path']}-{entry['ratio']}",
            "files": entry["ratio"].startswith("files-"),
            "times": times,
            "factor": None if middle is None else math.exp(middle),
            "lost": points_lost(tasks, entry["tasks"]) if tasks else None,
            "likely": probability_lost(tasks, entry["tasks"]),
        }
        if path in (None, entry["path"]):
            found.append({**entry, **more})
    return found if path is None else sorted(found, key=lambda e: -e["bpw_matrices"])


def _accuracy(results: Results) -> Iterator[Values]:
    """Points that the published method loses here, against those that the paper's figures lose."""
    found = [entry for entry in compressions(results) if not entry["files"]]
    if not (tasks := results["dense"]["tasks"]):
        factors = [(e["factor"], e["key"]) for e in found if e["path"] == "plain" and e["factor"] is not None]
        yield {"tasks": None, "best": min(factors, default=None), "over": {}}
        return
    losses = {entry["key"]: entry["lost"] for entry in found}
    over = {
        key: Difference(losses[key].value - paper, losses[key].error, losses[key].freedom)
        for key, paper in _PAPER_LOST.items()
        if key in losses
    }
    verdicts = {key: above_zero(over[key]) for key in losses if key in over}
    more = [key for key, verdict in verdicts.items() if verdict == Verdict.HELD]
    rest = [key for key in verdicts if key not in more]
    found_here = {"tasks": counted_tasks(tasks), "losses": losses, "paper": _PAPER_LOST}
    yield {**found_here, "over": over, "more": more, "rest": rest}


def _no_more(values: Values) -> Verdict:
    """The verdict on the claim that losses are no larger than in the paper; it holds unless one is clearly larger."""
    over = values["over"].values()
    return together(holds(above_zero(gap) != Verdict.HELD) for gap in over) if over else Verdict.NOT_SEEN


def _likely(results: Results) -> Iterator[Values]:
    """The probability that right answers lose, which reveals losses within the noise of accuracy."""
    if tasks := results["dense"]["tasks"]:
        found = {entry["key"]: entry["likely"] for entry in compressions(results)}
        beyond = [key for key, each in found.items() if above_zero(each) == Verdict.HELD]
        yield {"able": able(tasks), "losses": found, "beyond": beyond}


def _brittle(results: Results) -> Iterator[Values]:
    """The first setting of each path at which perplexity more than doubles; None if there is none."""
    for path in _PATHS:
        if found := compressions(results, path):
            broken = [e for e in found if e["factor"] is None or e["factor"] > _BRITTLE]
            at = (broken or found[-1:])[0]
            places = {"first": found[0]["key"], "broken": at["key"] if broken else None}
            factors = {e["key"]: e["factor"] for e in found if e["times"]}
            yield {"path": path, "factors": factors, "bits": at["bpw_matrices"], **places}


def _texts(results: Results) -> Iterator[Values]:
    """The texts that suffer least and most at each setting whose perplexities are all finite."""
    found = {}
    for entry in compressions(results):
        if entry["factor"] is not None:
            ordered = sorted(entry["times"].items(), key=lambda text: text[1])
            found[entry["key"]] = ordered[0], ordered[-1]
    yield {"texts": list(results["dense"]["perplexity"]), "by_text": found}


FINDINGS = (
    Finding("no more accuracy is lost than in the paper", _accuracy, _no_more),
    Finding("losses that accuracy hides", _likely),
    Finding("where quality breaks down", _brittle),
    Finding("which text suffers most", _texts),
)
_BITS = plot.Axis("bits per weight of the compressed matrices", reverse=True)


def picture(results: Results) -> plot.Picture:
    """Perplexity, accuracy and the probability of right answers over bits per weight."""
    tasks, log = results["dense"]["tasks"], plot.Axis(scale="log")
    legend = {"fontsize": 7, "handlelength": 3.5}
    marks = _perplexities(results)
    panels = [plot.Panel("perplexity over the dense model's", marks, _BITS, log, legend, small=True)]
    if tasks:
        names = counted_tasks(tasks)
        dense, guessed = (100 * accuracy(tasks, which, names) for which in ("acc", "chance"))
        own = {e["key"]: 100 * accuracy(e["tasks"], "acc", names) for e in compressions(results)}
        marks = [
            *_over_bits(results, "lost", own),
            plot.mark("axhline", dense, color="black", linewidth=1, label="dense"),
            plot.mark("axhline", guessed, color=plot.GREY, linewidth=1, label="guessing"),
        ]
        title = f"mean accuracy, %\n({', '.join(names)})"
        panels.append(plot.Panel(title, marks, _BITS, legend={"fontsize": 8}, small=True))
    if names := able(tasks):
        own = {e["key"]: e["likely"].value for e in compressions(results)}
        marks = [*_over_bits(results, "likely", own), plot.mark("axhline", 0, color="black", linewidth=1)]
        title = f"probability of right answers lost, points\n({', '.join(names)})"
        panels.append(plot.Panel(title, marks, _BITS, small=True))
    return plot.Picture(1 + 4 * len(panels), 4.2, [plot.Part([panels])])


def _perplexities(results: Results) -> list[plot.Mark]:
    """A line for each text at the paper's ratios, hollow markers on the plain path; squares: of whole files."""
    marks: list[plot.Mark] = []

    def add(entries: Sequence[Entry], y: str, style: plot.Style, label: str) -> None:
        if known := [entry for entry in entries if entry[y] is not None]:
            marks.append(plot.series(known, "bpw_matrices", y, style, label))

    for path, dash, face in (("plain", "--", "white"), ("calibrated", "-", "")):
        found = compressions(results, path)
        for n, text in enumerate(found[0]["times"] if found else ()):
            own = [{**entry, "own": entry["times"][text]} for entry in found if not entry["files"]]
            style = plot.look(n, markersize=4, linestyle=dash)
            add(own, "own", {**style, "markerfacecolor": face or style["color"]}, f"{path}: {text}")
        square = {"marker": "s", "linestyle": "", "color": face or "black", "markeredgecolor": "black"}
        files = [entry for entry in found if entry["files"]]
        add(files, "factor", square, f"{path}: whole files, mean of texts")
    words = f"{_BRITTLE:g} times: brittle from here on"
    place = {"xycoords": ("axes fraction", "data"), "va": "top", "ha": "right", "fontsize": 7}
    line = plot.mark("axhline", _BRITTLE, color=plot.GREY, linewidth=1)
    return [*marks, line, plot.mark("annotate", words, (0.99, _BRITTLE), **place)]


def _over_bits(results: Results, noise: str, values: dict[str, float]) -> list[plot.Mark]:
    """A line for each path over bits, with the intervals of the differences at `noise`."""
    marks: list[plot.Mark] = []
    for path, style, colour in (("plain", "--o", plot.COLOURS[1]), ("calibrated", "-s", plot.COLOURS[0])):
        if found := compressions(results, path):
            bits, errors = [e["bpw_matrices"] for e in found], [e[noise].margin for e in found]
            look = {"fmt": style, "color": colour, "markersize": 4, "capsize": 2, "label": path}
            marks.append(plot.mark("errorbar", bits, [values[e["key"]] for e in found], errors, **look))
    return marks
