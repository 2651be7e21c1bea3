"""What the study `rln` shows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

from pocketllm.studies.noise import Difference, by_seed
from pocketllm.studies.repeated import EXPLODED, exploded, highest, over_entries
from pocketllm.studies.study import Results, Table
from pocketllm.studies.style import dots, look, mean, mean_spread, number, plain_ticks
from pocketllm.studies.trials import TRAINING_TICKS, TRAININGS

NORMS = {"rln": "RLN", "ln": "LayerNorm", "none": "no norm"}
_ZEROS = 0.99  # nmse of training from which on it is no better than that of zeros, which is 1


def _of(results: Results, training: str, norm: str) -> list[Any]:
    """The results of a training and a norm, one for each kind."""
    return [value for key, value in results.items() if key.startswith(f"{training}.{norm}.")]


def _tried(results: Results, what: str) -> list[str]:
    """The learning rates or codebook sizes that were tried."""
    return [key.split(".", 2)[2] for key in results if key.startswith(f"{what}.rln.")]


def tables(results: Results) -> list[Table]:
    """All kinds together, each kind by itself, learning rates and codebook sizes."""
    return [_overview(results), _by_kind(results), *(_sweep(results, what) for what in ("rate", "size"))]


def _cells(entries: Sequence[Any]) -> list[str]:
    return [
        mean_spread(over_entries(entries, "end_nmse")),
        mean_spread(over_entries(entries, "latent_nmse")),
        number(highest(entries, "peak_gradient")),
        mean_spread(over_entries(entries, "last_gradient"), 2),
        "{} of {}".format(*exploded(entries)),
        mean_spread(over_entries(entries, "perplexity_of_use")),
    ]


_CELLS = ["nmse at the end", "by latent", "highest gradient norm", "last", "exploded", "perplexity of use"]


def _overview(results: Results) -> Table:
    rows = []
    for training, words in TRAININGS.items():
        for norm, title in NORMS.items():
            entries = _of(results, training, norm)
            best = [mean_spread(over_entries(entries, key)) for key in ("nmse", "rmse")]
            rows.append([words, title, *_cells(entries), *best])
    entry, ours = _of(results, "published", "rln")[0], _of(results, "ours", "rln")[0]
    note = (
        f"Mean ± standard deviation over {len(entry['seeds'])} seeds of the mean over "
        f"{len(_of(results, 'published', 'rln'))} kinds of matrix; d = {entry['settings']['vector_len']}, "
        f"K = {entry['codebook_size']}. At the end: of rows scaled to unit mean square, indices chosen as "
        "`compress` does; by latent: of the last epoch, indices by the nearest latent; best state: the matrix "
        "coded with the best state met, the start included, in the weights' own units. "
        f"Published start: random networks, normal codebook, learning rate "
        f"{entry['settings']['learning_rate']:g}, {entry['steps']} steps, gradients not cut, dead codewords "
        "left. Guarded: gradients cut at 1, dead codewords moved. Our start: identity and k-means, learning "
        f"rate {ours['settings']['learning_rate']:g}, {ours['steps']} steps, guarded. Exploded: the gradient "
        f"norm passed {EXPLODED:g} times that of the first step, or was not finite. Perplexity of use: of the "
        "indices of the last epoch, at most K."
    )
    header = ["training", "norm", *_CELLS, "nmse, best state", "RMSE, best state"]
    return Table("All kinds", header, rows, note)


def _by_kind(results: Results) -> Table:
    rows = []
    for training, words in TRAININGS.items():
        for entries in zip(*(_of(results, training, norm) for norm in NORMS), strict=True):
            cells = [mean_spread(entry["end_nmse"]) for entry in entries]
            rows.append([words, entries[0]["matrix"]["kind"], *cells])
    facts = [e["matrix"] for e in _of(results, "published", "rln")]
    used = ", ".join(f"{f['rows']} × {f['columns']} of `{f['name']}`" for f in facts)
    header = ["training", "kind", *NORMS.values()]
    return Table("Each kind", header, rows, f"nmse at the end. Rows used: {used}.")


def _sweep(results: Results, what: str) -> Table:
    """Learning rates (`rate`) or codebook sizes (`size`) on one matrix."""
    rows = [
        [value, title, *_cells([results[f"{what}.{norm}.{value}"]])]
        for value in _tried(results, what)
        for norm, title in NORMS.items()
    ]
    entry = results[f"{what}.rln.{_tried(results, what)[0]}"]
    title, first, start = {
        "rate": ("Learning rates", "learning rate", "Published start, not guarded"),
        "size": ("Codebook sizes", "K", "Published start, guarded"),
    }[what]
    note = f"{start}; `{entry['matrix']['name']}`, {len(entry['seeds'])} seeds."
    return Table(title, [first, "norm", *_CELLS], rows, note)


def findings(results: Results) -> list[str]:
    """Whether LayerNorm explodes, or ends worse, where RLN does not; and what each ends at."""
    grew = {norm: exploded(_of(results, "published", norm)) for norm in NORMS}
    told = ", ".join(f"{grew[norm][0]} of {grew[norm][1]} with {title}" for norm, title in NORMS.items())
    gap = _gap(results, "published")
    signs = grew["ln"][0] > grew["rln"][0], gap is not None and gap.value > 0 and gap.clear
    verdict = "Held" if all(signs) else "Held in part" if any(signs) else "Did not hold here"
    return [
        f"{verdict}: from the published start, at the published learning rate, gradients exploded in {told}; "
        f"LayerNorm {_gap_words(gap)}. From our start, where training has little to gain, it "
        f"{_gap_words(_gap(results, 'ours'))}.",
        *(_compared(results, training) for training in TRAININGS),
        _rate_words(results),
        _size_words(results),
    ]


def _gap(results: Results, training: str) -> Difference | None:
    """How much higher LayerNorm ends than RLN, over seeds, in the mean over the kinds."""
    return by_seed(*(over_entries(_of(results, training, norm), "end_nmse") for norm in ("ln", "rln")))


def _gap_words(gap: Difference | None) -> str:
    if gap is None:
        return "or RLN broke off in a training, so that their ends are not compared"
    return f"ends {gap.told('higher than RLN', 'lower than RLN')}"


def _compared(results: Results, training: str) -> str:
    """What each norm ends at, and in how many trainings RLN is better than LayerNorm."""
    entries = {norm: _of(results, training, norm) for norm in NORMS}
    ends = {norm: [v for e in entries[norm] for v in e["end_nmse"]] for norm in NORMS}
    pairs = list(zip(ends["rln"], ends["ln"], strict=True))
    better = sum(a is not None and (b is None or a < b) for a, b in pairs)
    told = "; ".join(
        f"{title} {mean_spread(over_entries(entries[norm], 'end_nmse'))} "
        f"(by latent {mean_spread(over_entries(entries[norm], 'latent_nmse'))})"
        for norm, title in NORMS.items()
    )
    start = mean(over_entries(entries["rln"], "start_nmse"))
    words = TRAININGS[training]
    return (
        f"{words[0].upper()}{words[1:]}: nmse {number(start)} before training with RLN; at the end {told}. "
        f"LayerNorm {_gap_words(_gap(results, training))}; RLN ends below it in {better} of {len(pairs)} trainings."
    )


def _rate_words(results: Results) -> str:
    """The learning rates at which each norm explodes, and where nothing is learned."""
    tried = _tried(results, "rate")

    def told(when: Callable[[Any], bool]) -> str:
        found = {
            title: [rate for rate in tried if when(results[f"rate.{norm}.{rate}"])]
            for norm, title in NORMS.items()
        }
        return "; ".join(
            f"{title} at {', '.join(rates) if rates else f'none up to {tried[-1]}'}"
            for title, rates in found.items()
        )

    return (
        f"Learning rates at which a training explodes, of those tried: {told(lambda entry: exploded([entry])[0] > 0)}. "
        f"Those at which most trainings end no better than zeros: {told(_learned_nothing)}."
    )


def _learned_nothing(entry: Any) -> bool:
    """Whether in most seeds training itself came out no better than zeros."""
    lost = sum(value is None or value >= _ZEROS for value in entry["latent_nmse"])
    return 2 * lost > len(entry["latent_nmse"])


def _size_words(results: Results) -> str:
    """Who ends lowest at each codebook size, where noise allows to say so."""
    told = []
    for size in _tried(results, "size"):
        ends = {title: results[f"size.{norm}.{size}"]["end_nmse"] for norm, title in NORMS.items()}
        known = {title: value for title, values in ends.items() if (value := mean(values)) is not None}
        first, *others = sorted(known, key=lambda title: known[title]) or ["none"]
        gaps = [by_seed(ends[other], ends[first]) for other in others]
        clear = bool(gaps) and all(gap is not None and gap.clear for gap in gaps)
        listed = ", ".join(f"{title} {mean_spread(values)}" for title, values in ends.items())
        told.append(f"{first if clear else 'none beyond noise'} at K = {size} ({listed})")
    return "Lowest nmse at the end, published start, guarded: " + "; ".join(told) + "."


def draw(results: Results, figure: Any) -> None:
    """Gradients over training; where training ends; gradients by learning rate."""
    figure.set_size_inches(13, 4.4)
    first, second, third = figure.subplots(1, 3)
    for n, (norm, title) in enumerate(NORMS.items()):
        _draw_gradients(first, _of(results, "published", norm), n, title)
        for place, training in enumerate(TRAININGS):
            ends = over_entries(_of(results, training, norm), "end_nmse")
            dots(second, place + 0.15 * (n - 1), ends, n)
        _draw_peaks(third, results, norm, n)
    first.set_yscale("log")
    plain_ticks(first.yaxis)
    first.set_title("gradient norm over training", fontsize=11)
    first.set_xlabel("share of training, published start\nline: median; band: lowest to highest")
    first.legend(fontsize=9, frameon=False)
    seeds = len(_of(results, "ours", "rln")[0]["seeds"])
    second.set_xticks(range(len(TRAININGS)), TRAINING_TICKS)
    second.set_title(f"nmse at the end, {seeds} seeds", fontsize=11)
    second.set_ylim(bottom=0)
    third.set_xscale("log")
    third.set_xticks([float(rate) for rate in _tried(results, "rate")])
    third.set_yscale("log")
    plain_ticks(third.xaxis)
    plain_ticks(third.yaxis)
    third.set_title("highest gradient norm, any seed", fontsize=11)
    third.set_xlabel("learning rate, published start\nhollow: most seeds end no better than zeros")
    first.set_ylabel("gradient norm")
    second.set_ylabel("nmse; mean ± standard deviation")


def _draw_peaks(axes: Any, results: Results, norm: str, n: int) -> None:
    """The highest gradient at each rate; hollow where training led to nothing, so that it says little of the norm."""
    for hollow in (False, True):
        points = []
        for rate in _tried(results, "rate"):
            entry = results[f"rate.{norm}.{rate}"]
            peak = highest([entry], "peak_gradient")
            if peak is not None and (not hollow or _learned_nothing(entry)):
                points.append((float(rate), peak))
        style = {**look(n), "markerfacecolor": "white", "linestyle": "none"} if hollow else look(n)
        axes.plot([x for x, _ in points], [y for _, y in points], **style)


def _draw_gradients(axes: Any, entries: Sequence[Any], n: int, title: str) -> None:
    known = [entry["gradient"] for entry in entries]
    length = min(len(gradient["middle"]) for gradient in known)
    x = [(place + 0.5) / length for place in range(length)]

    def across(key: str, how: Callable[[list[float]], float]) -> list[float]:
        """Over kinds; not a number where none of them is finite."""
        columns = [[g[key][i] for g in known if g[key][i] is not None] for i in range(length)]
        return [how(column) if column else float("nan") for column in columns]

    style = {**look(n), "marker": ""}
    axes.plot(x, across("middle", statistics.median), label=title, **style)
    axes.fill_between(x, across("low", min), across("high", max), color=style["color"], alpha=0.15, lw=0)
