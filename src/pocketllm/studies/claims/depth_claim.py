"""Are five blocks worse than three, and three better than one; and is the gap one of optimization?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocketllm.studies.definition import Results
from pocketllm.studies.measure.depth_steps import DEPTHS
from pocketllm.studies.measure.significance import Difference, by_seed, mean, paired
from pocketllm.studies.measure.trials import PUBLISHED, TRAININGS

Entry = Mapping[str, Any]
_SHARE = 0.25  # share of the gap between 5 and 3 blocks that may remain if tuning is said to close it


def group(results: Results, what: str) -> dict[tuple[str, ...], Entry]:
    """The rest of the key -> values: of `hidden` (depth, width), of `tuned` (depth, length, learning rate)."""
    split = {tuple(key.split(".", 3)): value for key, value in results.items()}
    return {key[1:]: value for key, value in split.items() if key[0] == what}


def start_of(results: Results, name: str, depth: int) -> Entry:
    """The training of that start and number of blocks."""
    return results[f"hidden.{depth}.16" if name == "guarded" else f"{name}.{depth}"]


def numbers(results: Results) -> dict[str, Any]:
    """For the findings: gaps between the depths, by start, tuned, and from the identity."""
    starts = {name: _by_depth(results, name) for name in TRAININGS}
    ends = starts["published"]["ends"]
    worse, fewer = starts["published"]["five"], by_seed(ends[1], ends[3])
    return {
        "verdict": _verdict(worse, fewer),
        "worse": worse,
        "fewer": fewer,
        "judged": [None if gap is None else _judged(gap) for gap in (worse, fewer)],
        "published": starts.pop("published"),
        "others": starts,
        "tuned": _tuned(results),
        "capacity": _capacity(results),
    }


def _by_depth(results: Results, name: str) -> dict[str, Any]:
    """The final errors of a start by number of blocks, and the difference of five and three."""
    ends = {depth: start_of(results, name, depth)["end_nmse"] for depth in DEPTHS}
    return {"title": TRAININGS[name], "ends": ends, "five": by_seed(ends[5], ends[3])}


def _judged(gap: Difference) -> str:
    """Whether the claim that the gap is above zero held."""
    if not gap.clear:
        return "is not seen"
    return "held" if gap.value > 0 else "did not hold"


def _verdict(worse: Difference | None, fewer: Difference | None) -> str:
    judged = [_judged(gap) for gap in (worse, fewer) if gap is not None]
    if judged == ["held", "held"]:
        return "Held"
    if "held" in judged:
        return "Held in part"
    return "Undecided here" if judged == ["is not seen", "is not seen"] else "Did not hold here"


def _tuned(results: Results) -> dict[str, Any]:
    """The best result of each depth over learning rates and lengths, and the conclusion about the gap."""
    best = {depth: _best(results, depth) for depth in DEPTHS}
    found: dict[str, Any] = {
        "best": {d: {**e, "edges": _edges(results, d, e)} for d, e in best.items() if e is not None},
        "before": None,
    }
    five, three = best[5], best[3]
    if five is None or three is None:
        return found
    rate = f"{PUBLISHED.learning_rate:g}"
    untuned = [group(results, "tuned")[depth, "1", rate] for depth in ("5", "3")]
    before, left = by_seed(*(e["end_nmse"] for e in untuned)), by_seed(five["end_nmse"], three["end_nmse"])
    if before is None or left is None:
        return found
    gaps = [
        [a - b for a, b in zip(more["end_nmse"], less["end_nmse"], strict=True)]
        for more, less in (untuned, (five, three))
    ]
    closed = left.value <= _SHARE * before.value and paired(*gaps).clear
    if not (before.clear and before.value > 0):
        outcome = "no gap"
    elif closed:
        outcome = "closed"
    else:
        outcome = "open" if left.clear and left.value > 0 else "undecided"
    seeds = len(untuned[0]["seeds"])
    return {**found, "before": before, "left": left, "outcome": outcome, "seeds": seeds}


def _best(results: Results, depth: int) -> Entry | None:
    """The lowest mean over learning rates and lengths."""
    found = [
        (value, entry)
        for key, entry in group(results, "tuned").items()
        if key[0] == str(depth) and (value := mean(entry["end_nmse"])) is not None
    ]
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _edges(results: Results, depth: int, entry: Entry) -> list[str]:
    """Settings for which the best value is the last one tried, so that a better one may lie beyond."""
    entries = [e for key, e in group(results, "tuned").items() if key[0] == str(depth)]
    rates = [e["settings"]["learning_rate"] for e in entries if e["steps"] == entry["steps"]]
    lengths = {e["steps"] for e in entries}
    edges = {
        "the highest rate tried at that length": len(rates) > 1
        and entry["settings"]["learning_rate"] == max(rates),
        "the greatest length": len(lengths) > 1 and entry["steps"] == max(lengths),
    }
    return [words for words, there in edges.items() if there]


def _capacity(results: Results) -> dict[str, Any] | None:
    """Initial and final errors from our start by depth, and the gap of most and fewest blocks; None if one diverged."""
    entries = {depth: results[f"ours.{depth}"] for depth in DEPTHS}
    found = {d: tuple(mean(e[key]) for key in ("start_nmse", "end_nmse")) for d, e in entries.items()}
    most, fewest = max(DEPTHS), min(DEPTHS)
    gap = by_seed(entries[most]["end_nmse"], entries[fewest]["end_nmse"])
    if gap is None or any(start is None for start, _ in found.values()):
        return None
    return {"by_depth": found, "gap": gap, "most": most, "fewest": fewest}
