"""Are five blocks worse than three, and three better than one; and is the gap one of optimization?"""

from __future__ import annotations

from collections.abc import Iterator

from pocketllm.studies.definition import Finding, Results, Values
from pocketllm.studies.measure.depth_steps import DEPTHS
from pocketllm.studies.measure.entries import Entry, lowest, select
from pocketllm.studies.measure.significance import by_seed, mean, paired
from pocketllm.studies.measure.trials import PUBLISHED, TRAINING_TICKS, TRAININGS
from pocketllm.studies.show import plot
from pocketllm.studies.verdicts import Verdict, above_zero, together

_GUARDED = "published start, guarded"
_SHARE = 0.25  # share of the gap between 5 and 3 blocks that may remain if tuning is said to close it


def start_of(results: Results, name: str, depth: int) -> Entry:
    """The training of that start and number of blocks."""
    return results[f"hidden.{depth}.16" if name == "guarded" else f"{name}.{depth}"]


def widths(results: Results) -> list[Entry]:
    """Trainings by `depth` and `width`."""
    return select(results, "hidden.{depth}.{width}")


def tuned(results: Results, depth: int | None = None) -> list[Entry]:
    """Trainings by length (`times`), learning `rate` and `depth`; those of a depth, or all."""
    found = [e for e in select(results, "tuned.{depth}.{times}.{rate}") if depth in (None, e["depth"])]
    return sorted(found, key=lambda e: (e["times"], e["rate"], e["depth"]))


def _by_depth(results: Results, name: str) -> dict[int, list[float | None]]:
    return {depth: start_of(results, name, depth)["end_nmse"] for depth in DEPTHS}


def _order(results: Results) -> Iterator[Values]:
    ends = _by_depth(results, "published")
    yield {"ends": ends, "worse": by_seed(ends[5], ends[3]), "fewer": by_seed(ends[1], ends[3])}


def _ordered(values: Values) -> Verdict:
    return together(above_zero(values[gap]) for gap in ("worse", "fewer"))


def _others(results: Results) -> Iterator[Values]:
    for name in ("guarded", "ours"):
        ends = _by_depth(results, name)
        yield {"title": TRAININGS[name], "ends": ends, "worse": by_seed(ends[5], ends[3])}


def _tuning(results: Results) -> Iterator[Values]:
    """The best of each depth; the gap of 5 and 3 blocks before and after, and what closed of it."""
    best = {depth: entry for depth in DEPTHS if (entry := lowest(tuned(results, depth), "end_nmse"))}
    untuned = [results[f"tuned.{depth}.1.{PUBLISHED.learning_rate:g}"]["end_nmse"] for depth in (5, 3)]
    chosen = [best[depth]["end_nmse"] for depth in (5, 3)] if {5, 3} <= set(best) else [[None], [None]]
    before, left = by_seed(*untuned), by_seed(*chosen)
    gaps = (
        [[a - b for a, b in zip(*pair, strict=True)] for pair in (untuned, chosen)] if before and left else []
    )
    yield {
        "best": {depth: {**entry, "edges": _edges(results, entry)} for depth, entry in best.items()},
        "compared": bool(gaps),
        "before": before,
        "left": left,
        "closed": paired(*gaps) if gaps else None,
        "seeds": len(untuned[0]),
    }


def _closes(values: Values) -> Verdict:
    """The verdict on the claim that tuning closes the gap between 5 and 3 blocks; not seen without a gap."""
    before, left, closed = (values[key] for key in ("before", "left", "closed"))
    if not values["compared"] or above_zero(before) != Verdict.HELD:
        return Verdict.NOT_SEEN
    if left.value <= _SHARE * before.value and closed.clear:
        return Verdict.HELD
    return Verdict.FAILED if above_zero(left) == Verdict.HELD else Verdict.NOT_SEEN


def _edges(results: Results, entry: Entry) -> list[str]:
    """Settings for which the best value is the last one tried, so that a better one may lie beyond."""
    entries = tuned(results, entry["depth"])
    rates = [e["settings"]["learning_rate"] for e in entries if e["steps"] == entry["steps"]]
    lengths = {e["steps"] for e in entries}
    highest = len(rates) > 1 and entry["settings"]["learning_rate"] == max(rates)
    longest = len(lengths) > 1 and entry["steps"] == max(lengths)
    edges = {"the highest rate tried at that length": highest, "the greatest length": longest}
    return [words for words, there in edges.items() if there]


def _capacity(results: Results) -> Iterator[Values]:
    """Initial and final errors from our start by depth, and the gap of most and fewest blocks."""
    entries = {depth: results[f"ours.{depth}"] for depth in DEPTHS}
    found = {d: tuple(mean(e[key]) for key in ("start_nmse", "end_nmse")) for d, e in entries.items()}
    most, fewest = max(DEPTHS), min(DEPTHS)
    gap = by_seed(entries[most]["end_nmse"], entries[fewest]["end_nmse"])
    known = gap is not None and all(start is not None for start, _ in found.values())
    yield {"by_depth": found, "gap": gap if known else None, "most": most, "fewest": fewest}


FINDINGS = (
    Finding("five blocks do worse than three, and one does, too", _order, _ordered),
    Finding("the same from other starts", _others),
    Finding("tuning closes the gap between five and three", _tuning, _closes),
    Finding("more blocks lack no capacity", _capacity),
)


def picture(results: Results) -> plot.Picture:
    """By start; by width; by learning rate and length."""
    lengths = sorted({entry["times"] for entry in tuned(results)})
    longer = f"; dashed: {lengths[-1]} times longer" if len(lengths) > 1 else ""
    starts = {
        f"{depth} block{'s' if depth > 1 else ''}": [
            start_of(results, name, depth)["end_nmse"] for name in TRAININGS
        ]
        for depth in DEPTHS
    }
    rates = sorted({entry["rate"] for entry in tuned(results)})
    by_width = [_line(widths(results), "width", depth) for depth in DEPTHS]
    by_rate = [
        _line([entry for entry in tuned(results) if entry["times"] == times], "rate", depth, dash)
        for depth in DEPTHS
        for times, dash in zip(lengths, plot.DASHES, strict=False)
    ]
    nmse = plot.Axis("nmse at the end; mean ± standard deviation")
    over_starts = plot.Axis(ticks=range(len(TRAININGS)), names=TRAINING_TICKS)
    sizes = sorted({entry["width"] for entry in widths(results)})
    over_widths = plot.Axis("hidden width", "log2", sizes)
    over_rates = plot.Axis(f"learning rate{longer}", "log", rates)
    row = [
        plot.Panel("by start", plot.dots(starts), over_starts, nmse, {"fontsize": 9}),
        plot.Panel(f"by hidden width, {_GUARDED}", by_width, over_widths),
        plot.Panel(f"by learning rate, {_GUARDED}", by_rate, over_rates),
    ]
    return plot.Picture(13, 4.4, [plot.Part([row], level=True)])


def _line(entries: list[Entry], x: str, depth: int, dash: object = "-") -> plot.Mark:
    """Where trainings with that many blocks end."""
    own = [entry for entry in entries if entry["depth"] == depth]
    return plot.mean_series(own, x, "end_nmse", plot.look(DEPTHS.index(depth), linestyle=dash))
