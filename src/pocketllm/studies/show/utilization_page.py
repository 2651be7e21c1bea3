"""Numbers of the tables and picture of the study `utilization`."""

from __future__ import annotations

from typing import Any

from pocketllm.studies.claims.utilization_claim import COLLAPSED, SHOWN, collapsed
from pocketllm.studies.definition import Results
from pocketllm.studies.measure.significance import mean
from pocketllm.studies.show.plot import GREY, Axis, Legend, Line, Mark, Panel, Part, Picture, Rule, look


def table_numbers(results: Results) -> dict[str, Any]:
    """For the tables: the trainings; the places in the histogram of the ranks that are shown."""
    ranks, size = results["published"]["ranks"], results["published"]["codebook_size"]
    wanted = [1, *(round(size * share) for share in (0.01, 0.1, 0.25, 0.5, 0.75)), size]
    return {
        "shown": SHOWN,
        "collapsed": collapsed,
        "limit": COLLAPSED,
        "places": [min(range(len(ranks)), key=lambda i: abs(ranks[i] - rank)) for rank in wanted],
    }


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
