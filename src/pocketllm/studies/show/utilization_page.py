"""Tables and picture of the study `utilization`."""

from __future__ import annotations

from pocketllm.studies.claims.utilization_claim import COLLAPSED, SHOWN, collapsed
from pocketllm.studies.definition import Note, Results, Table
from pocketllm.studies.measure.significance import mean
from pocketllm.studies.show.columns import on, seeds, text
from pocketllm.studies.show.numbers import number
from pocketllm.studies.show.plot import GREY, Axis, Legend, Line, Mark, Panel, Part, Picture, Rule, look

_USE = {
    "used, last epoch": seeds("trained_used"),
    "perplexity, last epoch": seeds("trained_perplexity"),
    "used, coded": seeds("coded_used"),
    "perplexity, coded": seeds("coded_perplexity"),
    "nmse, coded": seeds("nmse"),
    "collapsed": collapsed,
}


def tables(results: Results, note: Note) -> list[Table]:
    """The ends, and the use by rank over training."""
    ends = [(words, results[name]) for name, words in SHOWN.items()]
    about = note("Ends", entry=results["published"], collapsed=COLLAPSED)
    return [
        Table.of("Use at the end", ends, {"training": text(0), **on(1, _USE)}, about),
        _histogram(results, note("Histogram")),
    ]


def _histogram(results: Results, note: str) -> Table:
    """Use by rank: each epoch that was kept, and the coded matrix."""
    ranks, size = results["published"]["ranks"], results["published"]["codebook_size"]
    wanted = [1, *(round(size * share) for share in (0.01, 0.1, 0.25, 0.5, 0.75)), size]
    places = [min(range(len(ranks)), key=lambda i: abs(ranks[i] - rank)) for rank in wanted]
    rows = []
    for name, words in SHOWN.items():
        series = {f"epoch {epoch}": use for epoch, use in results[name]["use_by_rank"].items()}
        for when, use in {**series, "coded": results[name]["coded_use_by_rank"]}.items():
            rows.append([words, when, *(number(use[place], 2) for place in places)])
    header = ["training", "when", *(f"rank {ranks[place]}" for place in places)]
    return Table("Histogram", header, rows, note)


def picture(results: Results) -> Picture:
    """Perplexity and share of use over training; use by rank at the end."""
    perplexity, used = (
        [_over_epochs(results, name, key, n) for n, name in enumerate(SHOWN)]
        for key in ("perplexity_over_epochs", "used_over_epochs")
    )
    ranks: list[Mark] = [_by_rank(results, name, n) for n, name in enumerate(SHOWN)]
    epochs = Axis("epoch", low=1)
    row = [
        Panel(
            f"perplexity of use (K = {results['published']['codebook_size']})",
            perplexity,
            x=epochs,
            y=Axis(scale="log"),
        ),
        Panel("share of codewords used in an epoch", used, x=epochs, y=Axis(low=0, high=1.02)),
        Panel(
            "use in the last epoch (1: the mean)",
            [*ranks, Rule(1, {"color": GREY, "lw": 1})],
            x=Axis("codewords, most used first", "log"),
            y=Axis(scale="log"),
        ),
    ]
    return Picture(13, 4.8, [Part([row], legend=Legend({"fontsize": 9, "ncols": 3}))])


def _over_epochs(results: Results, name: str, key: str, n: int) -> Line:
    values = [mean(column) for column in zip(*results[name][key], strict=False)]
    return Line(range(1, len(values) + 1), values, look(n, marker=""), SHOWN[name])


def _by_rank(results: Results, name: str, n: int) -> Line:
    entry = results[name]
    last = entry["use_by_rank"][max(entry["use_by_rank"], key=int)]
    known = [(rank, use) for rank, use in zip(entry["ranks"], last, strict=True) if use]
    return Line([rank for rank, _ in known], [use for _, use in known], look(n, marker=""))
