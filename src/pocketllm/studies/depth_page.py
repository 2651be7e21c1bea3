"""What the study `depth` shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocketllm.studies.noise import Difference, by_seed, paired
from pocketllm.studies.repeated import exploded
from pocketllm.studies.study import Results, Table
from pocketllm.studies.style import DASHES, dots, look, mean, mean_spread, number, plain_ticks, spread
from pocketllm.studies.trials import PUBLISHED, TRAINING_TICKS, TRAININGS

DEPTHS = (1, 3, 5)
_SHARE = 0.25  # of the gap between 5 and 3 blocks that may remain where tuning is said to close it


def _group(results: Results, what: str) -> dict[tuple[str, ...], Mapping[str, Any]]:
    """The rest of the key -> values."""
    split = {tuple(key.split(".", 3)): value for key, value in results.items()}
    return {key[1:]: value for key, value in split.items() if key[0] == what}


def tables(results: Results) -> list[Table]:
    """Where training starts, widths, learning rates and lengths."""
    note = _note(results)
    return [
        Table("By start", ["training", "blocks", *_CELLS], _starts(results), note),
        Table(
            "By width, published start, guarded",
            ["hidden", "blocks", *_CELLS],
            [
                [key[1], key[0], *_cells(entry)]
                for key, entry in sorted(_group(results, "hidden").items(), key=_width)
            ],
        ),
        Table(
            "By length and learning rate, published start, guarded",
            ["steps", "learning rate", "blocks", *_CELLS],
            [
                [str(entry["steps"]), key[2], key[0], *_cells(entry)]
                for key, entry in sorted(_group(results, "tuned").items(), key=_length)
            ],
        ),
    ]


def _width(item: tuple[tuple[str, ...], Any]) -> tuple[int, int]:
    return int(item[0][1]), int(item[0][0])


def _length(item: tuple[tuple[str, ...], Any]) -> tuple[int, float, int]:
    return int(item[0][1]), float(item[0][2]), int(item[0][0])


_CELLS = ["nmse at the end", "by latent", "start", "exploded", "perplexity of use"]


def _cells(entry: Mapping[str, Any]) -> list[str]:
    return [
        mean_spread(entry["end_nmse"]),
        mean_spread(entry["latent_nmse"]),
        number(mean(entry["start_nmse"])),
        "{} of {}".format(*exploded([entry])),
        mean_spread(entry["perplexity_of_use"]),
    ]


def _start(results: Results, name: str, depth: int) -> Mapping[str, Any]:
    return results[f"hidden.{depth}.16" if name == "guarded" else f"{name}.{depth}"]


def _starts(results: Results) -> list[list[str]]:
    return [
        [words, str(depth), *_cells(_start(results, name, depth))]
        for name, words in TRAININGS.items()
        for depth in DEPTHS
    ]


def _note(results: Results) -> str:
    entry, ours = results["published.3"], results["ours.3"]
    facts = entry["matrix"]
    return (
        f"{facts['rows']} rows of `{facts['name']}`, d = {entry['settings']['vector_len']}, K = "
        f"{entry['codebook_size']}, hidden width {entry['settings']['hidden']}; mean ± standard deviation over "
        f"{len(entry['seeds'])} seeds. Published start: random networks, normal codebook, learning rate "
        f"{entry['settings']['learning_rate']:g}, {entry['steps']} steps. Guarded: gradients cut at 1, dead "
        f"codewords moved. Our start: identity and k-means, learning rate {ours['settings']['learning_rate']:g}, "
        f"{ours['steps']} steps, guarded. nmse of rows at unit mean square, indices as `compress` chooses them; by "
        "latent: of the last epoch, nearest latents."
    )


def _best(results: Results, depth: int) -> Mapping[str, Any] | None:
    """The lowest mean over learning rates and lengths."""
    found = [
        (value, entry)
        for key, entry in _group(results, "tuned").items()
        if key[0] == str(depth) and (value := mean(entry["end_nmse"])) is not None
    ]
    return min(found, key=lambda pair: pair[0])[1] if found else None


def findings(results: Results) -> list[str]:
    """Whether five blocks do worse than three as published, three best; and whether tuning closes the gap."""
    ends = {depth: _start(results, "published", depth)["end_nmse"] for depth in DEPTHS}
    worse, fewer = by_seed(ends[5], ends[3]), by_seed(ends[1], ends[3])
    if worse is None or fewer is None:
        first = "Did not hold here: as published, a training broke off, so that nothing can be said of their order."
    else:
        judged = [_judged(gap) for gap in (worse, fewer)]
        verdict = (
            "Held"
            if judged == ["held", "held"]
            else "Held in part"
            if "held" in judged
            else "Did not hold here"
        )
        if judged == ["is not seen"] * 2:
            verdict = "Undecided here"
        first = (
            f"{verdict}: as published, {_by_depth(results, 'published')}. That five do worse than three "
            f"{_judged(worse)}: they end {worse.told()}. That three are right against one {_judged(fewer)}: one block "
            f"ends {fewer.told()}."
        )
    others = [
        f"{words[0].upper()}{words[1:]}: {_by_depth(results, name)}{_five_and_three(results, name)}."
        for name, words in TRAININGS.items()
        if name != "published"
    ]
    return [first, *others, _tuned_words(results), _capacity_words(results)]


def _judged(gap: Difference) -> str:
    """Of a claim that the gap is above zero."""
    if not gap.clear:
        return "is not seen"
    return "held" if gap.value > 0 else "did not hold"


def _five_and_three(results: Results, name: str) -> str:
    gap = by_seed(*(_start(results, name, depth)["end_nmse"] for depth in (5, 3)))
    return "" if gap is None else f"; five end {gap.told()}, than three"


def _by_depth(results: Results, name: str) -> str:
    told = [f"{mean_spread(_start(results, name, d)['end_nmse'])} with {d}" for d in DEPTHS]
    return f"nmse {', '.join(told)} block(s)"


def _tuned_words(results: Results) -> str:
    """The best that each depth reaches over learning rates and lengths, and what that says of the gap."""
    best = {depth: _best(results, depth) for depth in DEPTHS}
    told = ", ".join(
        f"{depth}: {mean_spread(entry['end_nmse'])} (learning rate {entry['settings']['learning_rate']:g}, "
        f"{entry['steps']} steps{_at_the_edge(results, depth, entry)})"
        for depth, entry in best.items()
        if entry is not None
    )
    words = f"The best over learning rates and lengths, by number of blocks: {told}."
    if best[5] is None or best[3] is None:
        return words
    untuned = [entry["end_nmse"] for entry in _untuned(results)]
    before, left = by_seed(*untuned), by_seed(best[5]["end_nmse"], best[3]["end_nmse"])
    if before is None or left is None:
        return words
    seeds = len(_untuned(results)[0]["seeds"])
    words += (
        f" From the same {seeds} seeds five blocks end {before.told()}, than three at the published learning rate and "
        f"length, and {left.told()}, each at its best: "
    )
    if not (before.clear and before.value > 0):
        return f"{words}whether tuning closes a gap, these trainings cannot say."
    gaps = [
        [a - b for a, b in zip(*pair, strict=True)]
        for pair in (untuned, (best[5]["end_nmse"], best[3]["end_nmse"]))
    ]
    closed = paired(*gaps)
    if left.value <= _SHARE * before.value and closed.clear:
        return f"{words}it is one of optimization."
    if left.clear and left.value > 0:
        return f"{words}these learning rates and lengths do not close it."
    return f"{words}whether tuning closes it, these trainings cannot say."


def _untuned(results: Results) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Five and three blocks at the published learning rate and length, from the seeds of the tuned trainings."""
    rate = f"{PUBLISHED.learning_rate:g}"
    tuned = _group(results, "tuned")
    return tuned["5", "1", rate], tuned["3", "1", rate]


def _at_the_edge(results: Results, depth: int, entry: Mapping[str, Any]) -> str:
    """Says where the best lies at the end of what was tried, so that a better one may lie beyond."""
    entries = [e for key, e in _group(results, "tuned").items() if key[0] == str(depth)]
    alike = [e["settings"]["learning_rate"] for e in entries if e["steps"] == entry["steps"]]
    edges = []
    if len(alike) > 1 and entry["settings"]["learning_rate"] == max(alike):
        edges.append("the highest rate tried at that length")
    lengths = {e["steps"] for e in entries}
    if len(lengths) > 1 and entry["steps"] == max(lengths):
        edges.append("the greatest length")
    return f"; {', '.join(edges)}" if edges else ""


def _capacity_words(results: Results) -> str:
    """More blocks can do all that fewer can; where they begin as the identity, do they?"""
    entries = {depth: results[f"ours.{depth}"] for depth in DEPTHS}
    starts, ends = ([mean(e[key]) for e in entries.values()] for key in ("start_nmse", "end_nmse"))
    gap = by_seed(entries[max(DEPTHS)]["end_nmse"], entries[min(DEPTHS)]["end_nmse"])
    if gap is None or None in starts:
        return "From our start a training broke off."
    told = "; ".join(
        f"{depth}: {number(start, 5)} to {number(end, 5)}"
        for depth, start, end in zip(DEPTHS, starts, ends, strict=True)
    )
    return (
        "By construction a network with more blocks can do all that one with fewer can, so it lacks no capacity, and "
        "what it loses from a random start is a matter of optimization. From our start, where all begin as the same "
        f"identity, little is learned, nmse before and after by number of blocks: {told}; {max(DEPTHS)} end "
        f"{gap.told()}, than {min(DEPTHS)}."
    )


def draw(results: Results, figure: Any) -> None:
    """By start; by width; by learning rate and length."""
    figure.set_size_inches(13, 4.4)
    first, second, third = figure.subplots(1, 3)
    for n, depth in enumerate(DEPTHS):
        for place, name in enumerate(TRAININGS):
            words = {"label": f"{depth} block{'s' if depth > 1 else ''}"} if place == 0 else {}
            dots(first, place + 0.15 * (n - 1), _start(results, name, depth)["end_nmse"], n, **words)
        wide = {
            float(key[1]): e["end_nmse"]
            for key, e in _group(results, "hidden").items()
            if key[0] == str(depth)
        }
        _line(second, wide, n)
        lengths = sorted({int(key[1]) for key in _group(results, "tuned")})
        for dash, times in enumerate(lengths):
            rates = {
                float(key[2]): e["end_nmse"]
                for key, e in _group(results, "tuned").items()
                if key[:2] == (str(depth), str(times))
            }
            _line(third, rates, n, linestyle=DASHES[dash])
    first.set_xticks(range(len(TRAININGS)), TRAINING_TICKS)
    first.legend(fontsize=9, frameon=False)
    first.set_title("by start", fontsize=11)
    second.set_title("by hidden width, published start, guarded", fontsize=11)
    third.set_title("by learning rate, published start, guarded", fontsize=11)
    first.set_ylabel("nmse at the end; mean ± standard deviation")
    second.set_xlabel("hidden width")
    third.set_xlabel("learning rate" + (f"; dashed: {lengths[-1]} times longer" if len(lengths) > 1 else ""))
    third.set_xscale("log")
    second.set_xscale("log", base=2)
    second.set_xticks(sorted({int(key[1]) for key in _group(results, "hidden")}))
    third.set_xticks(sorted({float(key[2]) for key in _group(results, "tuned")}))
    for axes in (second, third):
        plain_ticks(axes.xaxis)
    top = max(axes.get_ylim()[1] for axes in (first, second, third))
    for axes in (first, second, third):
        axes.set_ylim(0, top)


def _line(axes: Any, values: Mapping[float, list[float | None]], series: int, **more: Any) -> None:
    known = {x: v for x, v in sorted(values.items()) if mean(v) is not None}
    style = {**look(series), "linestyle": "-", **more}
    axes.errorbar(
        list(known),
        [mean(v) for v in known.values()],
        [spread(v) for v in known.values()],
        capsize=3,
        **style,
    )
