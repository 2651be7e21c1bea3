"""Does the published start leave codewords unused, does moving them help, and is a provoked collapse detected?"""

from __future__ import annotations

from collections.abc import Iterator

from pocketllm.studies.definition import Finding, Results, Values
from pocketllm.studies.measure.entries import Entry
from pocketllm.studies.measure.significance import by_seed, mean
from pocketllm.studies.show import plot
from pocketllm.studies.verdicts import Verdict, above_zero, holds

SHOWN = {
    "published": "published start",
    "revived": "published start, dead ones moved",
    "guarded": "the same, gradients cut",
    "ours": "k-means and identity",
    "collapse-norm": "provoked: no norm",
    "collapse-rate": "provoked: ten times the rate",
}
"""The trainings and their names on the page."""
COLLAPSED = 0.1
"""A codebook has collapsed if its perplexity of use is less than this share of K."""
_ALL = 0.99  # a codebook counts as used if this share of its codewords is


def collapsed(entry: Entry) -> str:
    """In how many of the seeds the use in the last epoch has collapsed."""
    limit = COLLAPSED * entry["codebook_size"]
    return f"{sum(p is None or p < limit for p in entry['trained_perplexity'])} of {len(entry['seeds'])}"


def places(results: Results) -> list[int]:
    """The places in the histograms that the page shows."""
    ranks, size = results["published"]["ranks"], results["published"]["codebook_size"]
    wanted = [1, *(round(size * share) for share in (0.01, 0.1, 0.25, 0.5, 0.75)), size]
    return [min(range(len(ranks)), key=lambda i: abs(ranks[i] - rank)) for rank in wanted]


def _published(results: Results) -> Iterator[Values]:
    entry = results["published"]
    idle = sum(used is None or used < _ALL for used in entry["trained_used"])
    yield {"idle": idle, "count": len(entry["trained_used"]), "all": _ALL, **_use(results, "published")}


def _others(results: Results) -> Iterator[Values]:
    published = results["published"]["nmse"]
    others = [_use(results, name) for name in ("revived", "guarded", "ours")]
    gaps = {use["title"]: by_seed(published, use["nmse"]) for use in others}
    lower = [title for title, gap in gaps.items() if above_zero(gap) == Verdict.HELD]
    known = any(gap is not None and gap.known for gap in gaps.values())
    yield {"others": others, "published": published, "known": known, "lower": lower}


def _provoked(results: Results) -> Iterator[Values]:
    for name in ("collapse-norm", "collapse-rate"):
        series = results[name]["perplexity_over_epochs"]
        first, last = (mean([by_epoch[at] for by_epoch in series]) for at in (0, -1))
        yield {"first": first, "last": last, "collapsed": collapsed(results[name]), **_use(results, name)}


def _use(results: Results, name: str) -> Values:
    """A training's use of the codebook: means over the seeds, None where one is not finite."""
    entry, size = results[name], results["published"]["codebook_size"]
    means = ("trained_used", "coded_used", "trained_perplexity", "end_nmse")
    found = {key: mean(entry[key]) for key in means}
    return {"title": SHOWN[name], "size": size, "nmse": entry["nmse"], **found}


FINDINGS = (
    Finding("the published start leaves no codewords unused", _published, lambda v: holds(not v["idle"])),
    Finding("the use from other starts", _others),
    Finding("a provoked collapse", _provoked),
)


def picture(results: Results) -> plot.Picture:
    """Perplexity and share of use over training; use by rank at the end."""
    perplexity, used = (
        [_over_epochs(results[name][key], n, title) for n, (name, title) in enumerate(SHOWN.items())]
        for key in ("perplexity_over_epochs", "used_over_epochs")
    )
    ranks = [_by_rank(results[name], n) for n, name in enumerate(SHOWN)]
    size, epochs = results["published"]["codebook_size"], plot.Axis("epoch", low=1)
    mean_use, log = plot.mark("axhline", 1, color=plot.GREY, lw=1), plot.Axis(scale="log")
    row = [
        plot.Panel(f"perplexity of use (K = {size})", perplexity, epochs, log),
        plot.Panel("share of codewords used in an epoch", used, epochs, plot.Axis(low=0, high=1.02)),
        plot.Panel(
            "use in the last epoch (1: the mean)",
            [*ranks, mean_use],
            plot.Axis("codewords, most used first", "log"),
            log,
        ),
    ]
    return plot.Picture(13, 4.8, [plot.Part([row], legend=plot.Legend({"fontsize": 9, "ncols": 3}))])


def _over_epochs(by_seed: list[list[float | None]], n: int, title: str) -> plot.Mark:
    values = [mean(column) for column in zip(*by_seed, strict=False)]
    return plot.mark("plot", range(1, len(values) + 1), values, label=title, **plot.look(n, marker=""))


def _by_rank(entry: Entry, n: int) -> plot.Mark:
    last = entry["use_by_rank"][max(entry["use_by_rank"], key=int)]
    known = [{"rank": rank, "use": use} for rank, use in zip(entry["ranks"], last, strict=True) if use]
    return plot.series(known, "rank", "use", plot.look(n, marker=""))
