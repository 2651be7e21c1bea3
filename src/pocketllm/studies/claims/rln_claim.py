"""Does LayerNorm fail where RLN does not: do its gradients explode, or does it end worse?"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator

from pocketllm.studies.definition import Finding, Results, Values
from pocketllm.studies.measure.entries import Entry, exploded, highest, lowest, over_entries, select
from pocketllm.studies.measure.significance import Difference, by_seed, mean
from pocketllm.studies.measure.trials import NORMS, TRAINING_TICKS, TRAININGS
from pocketllm.studies.show import plot
from pocketllm.studies.verdicts import Verdict, above_zero, holds, together

SWEEPS = (
    ("rate", "Learning rates", "learning rate", "Published start, not guarded"),
    ("size", "Codebook sizes", "K", "Published start, guarded"),
)
"""What is varied on one matrix: word of the keys, title and heading of the table, start."""
_ZEROS = 0.99  # nmse above which training is no better than zeros, whose nmse is 1


def trained(results: Results, training: str, norm: str) -> list[Entry]:
    """A training with a norm, an entry for each kind of matrix."""
    return select(results, f"{training}.{norm}.{{kind}}")


def sweep(results: Results, what: str, norm: str = "rln") -> list[Entry]:
    """Learning rates (`rate`) or codebook sizes (`size`) with a norm; the value is at `tried`."""
    return select(results, f"{what}.{norm}.{{tried}}")


def _idle(entry: Entry) -> bool:
    """Whether training ended no better than zeros in most seeds."""
    lost = sum(value is None or value >= _ZEROS for value in entry["latent_nmse"])
    return 2 * lost > len(entry["latent_nmse"])


def _gap(results: Results, training: str) -> Difference | None:
    """How much higher LayerNorm ends than RLN."""
    return by_seed(*(over_entries(trained(results, training, norm), "end_nmse") for norm in ("ln", "rln")))


def _failure(results: Results) -> Iterator[Values]:
    yield {
        "grew": {norm: exploded(trained(results, "published", norm)) for norm in NORMS},
        "gap": _gap(results, "published"),
        "ours": _gap(results, "ours"),
    }


def _fails(values: Values) -> Verdict:
    explodes, worse = values["grew"]["ln"][0] > values["grew"]["rln"][0], above_zero(values["gap"])
    return together([holds(explodes), holds(worse == Verdict.HELD)])


def _trainings(results: Results) -> Iterator[Values]:
    for training, title in TRAININGS.items():
        entries = {norm: trained(results, training, norm) for norm in NORMS}
        ends = {norm: [v for e in entries[norm] for v in e["end_nmse"]] for norm in NORMS}
        pairs = list(zip(ends["rln"], ends["ln"], strict=True))
        yield {
            "title": title,
            "start": mean(over_entries(entries["rln"], "start_nmse")),
            "end": {norm: over_entries(entries[norm], "end_nmse") for norm in NORMS},
            "latent": {norm: over_entries(entries[norm], "latent_nmse") for norm in NORMS},
            "gap": _gap(results, training),
            "better": sum(a is not None and (b is None or a < b) for a, b in pairs),
            "count": len(pairs),
        }


def _rates(results: Results) -> Iterator[Values]:
    def at(when: Callable[[Entry], bool]) -> dict[str, list[str]]:
        """Name of a norm -> the learning rates at which that is so."""
        tried = {title: sweep(results, "rate", norm) for norm, title in NORMS.items()}
        return {title: [e["tried"] for e in found if when(e)] for title, found in tried.items()}

    yield {
        "exploding": at(lambda entry: exploded([entry])[0] > 0),
        "idle": at(_idle),
        "most": sweep(results, "rate")[-1]["tried"],
    }


def _sizes(results: Results) -> Iterator[Values]:
    """Final errors by norm at each size, and the norm of the lowest where it is lower than the others beyond noise."""
    found = {}
    for size in (entry["tried"] for entry in sweep(results, "size")):
        entries = [{"title": t, **results[f"size.{norm}.{size}"]} for norm, t in NORMS.items()]
        ends, best = {e["title"]: e["end_nmse"] for e in entries}, lowest(entries, "end_nmse")
        known = [e for e in entries if mean(e["end_nmse"]) is not None and e is not best]
        gaps = [by_seed(e["end_nmse"], best["end_nmse"]) for e in known] if best else []
        clear = bool(gaps) and all(gap is not None and gap.clear for gap in gaps)
        found[size] = {"lowest": best["title"] if best and clear else "none beyond noise", "ends": ends}
    yield {"sizes": found}


FINDINGS = (
    Finding("LayerNorm fails in training where RLN does not", _failure, _fails),
    Finding("where each training ends", _trainings),
    Finding("learning rates that are too high", _rates),
    Finding("the best norm at each codebook size", _sizes),
)


def picture(results: Results) -> plot.Picture:
    """Gradients over training; where training ends; gradients by learning rate."""
    gradients, peaks = (
        [mark for n, (norm, title) in enumerate(NORMS.items()) for mark in drawn(results, norm, n, title)]
        for drawn in (_gradients, _peaks)
    )
    ends = {
        title: [over_entries(trained(results, training, norm), "end_nmse") for training in TRAININGS]
        for norm, title in NORMS.items()
    }
    seeds = len(trained(results, "ours", "rln")[0]["seeds"])
    rates = [entry["tried"] for entry in sweep(results, "rate")]
    over_training = plot.Axis("share of training, published start\nline: median; band: lowest to highest")
    over_starts = plot.Axis(ticks=range(len(TRAININGS)), names=TRAINING_TICKS)
    hollow = "learning rate, published start\nhollow: most seeds end no better than zeros"
    norm, nmse = plot.Axis("gradient norm", "log"), plot.Axis("nmse; mean ± standard deviation", low=0)
    log = plot.Axis(scale="log")
    row = [
        plot.Panel("gradient norm over training", gradients, over_training, norm, {"fontsize": 9}),
        plot.Panel(f"nmse at the end, {seeds} seeds", plot.dots(ends), over_starts, nmse),
        plot.Panel("highest gradient norm, any seed", peaks, plot.Axis(hollow, "log", rates), log),
    ]
    return plot.Picture(13, 4.4, [plot.Part([row])])


def _peaks(results: Results, norm: str, n: int, title: str) -> list[plot.Mark]:
    """The highest gradient at each rate; hollow where training led to nothing, so that it says little of the norm."""
    points = [
        {"rate": entry["tried"], "peak": highest([entry], "peak_gradient"), "idle": _idle(entry)}
        for entry in sweep(results, "rate", norm)
    ]
    known = [point for point in points if point["peak"] is not None]
    hollow = plot.look(n, markerfacecolor="white", linestyle="none")
    return [
        plot.series(known, "rate", "peak", plot.look(n)),
        plot.series([point for point in known if point["idle"]], "rate", "peak", hollow),
    ]


def _gradients(results: Results, norm: str, n: int, title: str) -> list[plot.Mark]:
    """Lowest, median and highest over the kinds; not a number where none of them is finite."""
    known, style = (
        [entry["gradient"] for entry in trained(results, "published", norm)],
        plot.look(n, marker=""),
    )
    length = min(len(gradient["middle"]) for gradient in known)
    low, middle, high = (
        [how([g[key][i] for g in known if g[key][i] is not None] or [math.nan]) for i in range(length)]
        for key, how in (("low", min), ("middle", statistics.median), ("high", max))
    )
    x = [(place + 0.5) / length for place in range(length)]
    band = plot.mark("fill_between", x, low, high, color=style["color"], alpha=0.15, lw=0)
    return [plot.mark("plot", x, middle, label=title, **style), band]
