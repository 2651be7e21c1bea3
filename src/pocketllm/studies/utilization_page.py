"""What the study `utilization` shows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocketllm.studies.noise import by_seed
from pocketllm.studies.study import Results, Table
from pocketllm.studies.style import GREY, look, mean, mean_spread, number, plain_ticks

SHOWN = {
    "published": "published start",
    "revived": "published start, dead ones moved",
    "guarded": "the same, gradients cut",
    "ours": "k-means and identity",
    "collapse-norm": "provoked: no norm",
    "collapse-rate": "provoked: ten times the rate",
}
_OTHERS = ("revived", "guarded", "ours")
_ALL = 0.99  # a codebook is used where this share of its codewords is
COLLAPSED = 0.1
"""A codebook has collapsed where its perplexity of use is less than this share of K."""


def _in_seeds(entry: Mapping[str, Any]) -> str:
    return f"{_collapsed(entry)} of {len(entry['seeds'])}"


def _collapsed(entry: Mapping[str, Any]) -> int:
    """Seeds whose last epoch's use has collapsed."""
    return sum(p is None or p < COLLAPSED * entry["codebook_size"] for p in entry["trained_perplexity"])


def tables(results: Results) -> list[Table]:
    """The ends, and the use by rank over training."""
    return [_ends(results), _histogram(results)]


def _ends(results: Results) -> Table:
    keys = ("trained_used", "trained_perplexity", "coded_used", "coded_perplexity", "nmse")
    rows = [
        [words, *(mean_spread(results[name][key]) for key in keys), _in_seeds(results[name])]
        for name, words in SHOWN.items()
    ]
    entry = results["published"]
    facts = entry["matrix"]
    note = (
        f"{facts['rows']} rows of `{facts['name']}`, d = {entry['settings']['vector_len']}, K = "
        f"{entry['codebook_size']}, {entry['steps']} steps, {len(entry['seeds'])} seed(s): mean ± standard "
        "deviation. Last epoch: nearest latents while training goes on. Coded: the matrix coded as `compress` "
        f"does, with the best state met. Collapsed: a perplexity of use below {COLLAPSED:g} K in the last epoch."
    )
    header = ["training", "used, last epoch", "perplexity, last epoch", "used, coded", "perplexity, coded"]
    return Table("Use at the end", [*header, "nmse, coded", "collapsed"], rows, note)


def _histogram(results: Results) -> Table:
    """Use by rank: each epoch that was kept, and the coded matrix."""
    entry = results["published"]
    size = entry["codebook_size"]
    wanted = [1, *(round(size * share) for share in (0.01, 0.1, 0.25, 0.5, 0.75)), size]
    places = [min(range(len(entry["ranks"])), key=lambda i: abs(entry["ranks"][i] - rank)) for rank in wanted]
    rows = []
    for name, words in SHOWN.items():
        found = results[name]
        series = {f"epoch {epoch}": use for epoch, use in found["use_by_rank"].items()}
        for when, use in {**series, "coded": found["coded_use_by_rank"]}.items():
            rows.append([words, when, *(number(use[place], 2) for place in places)])
    header = ["training", "when", *(f"rank {entry['ranks'][place]}" for place in places)]
    note = "How often the codeword of a rank is used, the most used one first; 1 is the mean. First seed."
    return Table("Histogram", header, rows, note)


def findings(results: Results) -> list[str]:
    """Whether all codewords of the published start are used, what moving them brings, what a collapse is."""
    published, size = results["published"], results["published"]["codebook_size"]
    idle = sum(used is None or used < _ALL for used in published["trained_used"])
    count = len(published["trained_used"])
    words = [
        f"{'Did not hold here' if idle else 'Held here'}, that the published start leaves no codewords unused "
        f"without a measure against that: in {idle} of {count} trainings the last epoch uses fewer than {_ALL:.0%} "
        f"of them, in the mean {_share(published, 'trained_used')} with a perplexity of "
        f"{_of_size(published)}; coding the matrix uses {_share(published, 'coded_used')}."
    ]
    told = "; ".join(
        f"{SHOWN[name]}: {_share(results[name], 'trained_used')} used, perplexity {_of_size(results[name])}, "
        f"nmse {mean_spread(results[name]['nmse'])}"
        for name in _OTHERS
    )
    gaps = {SHOWN[name]: by_seed(results[name]["nmse"], published["nmse"]) for name in _OTHERS}
    known = {name: gap for name, gap in gaps.items() if gap is not None and gap.known}
    lower = [name for name, gap in known.items() if gap.value < 0 and gap.clear]
    below = f"Lower than that beyond noise: {', '.join(lower) or 'none'}"
    if not known:
        below = "From one seed nothing can be said of noise"
    words.append(
        f"Other starts, last epoch: {told}; published start: nmse {mean_spread(published['nmse'])}. {below}."
    )
    for name in ("collapse-norm", "collapse-rate"):
        entry = results[name]
        first, last = (_at(entry, place) for place in (0, -1))
        words.append(
            f"{SHOWN[name][0].upper()}{SHOWN[name][1:]}: perplexity of use goes from {first} in the first epoch to "
            f"{last} of {size} in the last, {_share(entry, 'trained_used')} of the codewords used; collapsed in "
            f"{_in_seeds(entry)} trainings. The error of training ends at an nmse of "
            f"{number(mean(entry['end_nmse']))}."
        )
    return words


def _at(entry: Mapping[str, Any], place: int) -> str:
    return number(mean([series[place] for series in entry["perplexity_over_epochs"]]))


def _share(entry: Mapping[str, Any], key: str) -> str:
    value = mean(entry[key])
    return "not finite" if value is None else f"{value:.1%}"


def _of_size(entry: Mapping[str, Any]) -> str:
    return f"{number(mean(entry['trained_perplexity']))} of {entry['codebook_size']}"


def draw(results: Results, figure: Any) -> None:
    """Perplexity and share of use over training; use by rank at the end."""
    figure.set_size_inches(13, 4.8)
    first, second, third = figure.subplots(1, 3)
    size = results["published"]["codebook_size"]
    for n, (name, words) in enumerate(SHOWN.items()):
        entry, style = results[name], {**look(n), "marker": ""}
        for axes, key in ((first, "perplexity_over_epochs"), (second, "used_over_epochs")):
            values = [mean(column) for column in zip(*entry[key], strict=False)]
            axes.plot(range(1, len(values) + 1), values, label=words, **style)
        last = entry["use_by_rank"][max(entry["use_by_rank"], key=int)]
        known = [(rank, use) for rank, use in zip(entry["ranks"], last, strict=True) if use]
        third.plot(*zip(*known, strict=True), **style)
    for axes in (first, second):
        axes.set_xlabel("epoch")
        axes.set_xlim(left=1)
    first.set_yscale("log")
    plain_ticks(first.yaxis)
    first.set_title(f"perplexity of use (K = {size})", fontsize=11)
    second.set_ylim(0, 1.02)
    second.set_title("share of codewords used in an epoch", fontsize=11)
    third.axhline(1, color=GREY, lw=1)
    third.set_xscale("log")
    third.set_yscale("log")
    plain_ticks(third.xaxis)
    plain_ticks(third.yaxis)
    third.set_xlabel("codewords, most used first")
    third.set_title("use in the last epoch (1: the mean)", fontsize=11)
    figure.legend(
        *first.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9, frameon=False
    )
