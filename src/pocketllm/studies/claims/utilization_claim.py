"""Does the published start leave codewords unused, does moving them help, and is a provoked collapse detected?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pocketllm.studies.definition import Results
from pocketllm.studies.measure.significance import by_seed, mean

SHOWN = {
    "published": "published start",
    "revived": "published start, dead ones moved",
    "guarded": "the same, gradients cut",
    "ours": "k-means and identity",
    "collapse-norm": "provoked: no norm",
    "collapse-rate": "provoked: ten times the rate",
}
"""The trainings and their names on the page."""
_OTHERS, _PROVOKED = ("revived", "guarded", "ours"), ("collapse-norm", "collapse-rate")
_ALL = 0.99  # a codebook counts as used if this share of its codewords is
COLLAPSED = 0.1
"""A codebook has collapsed if its perplexity of use is less than this share of K."""


def collapsed(entry: Mapping[str, Any]) -> str:
    """In how many of the seeds the use in the last epoch has collapsed."""
    limit = COLLAPSED * entry["codebook_size"]
    return f"{sum(p is None or p < limit for p in entry['trained_perplexity'])} of {len(entry['seeds'])}"


def numbers(results: Results) -> dict[str, Any]:
    """For the findings: shares and perplexities of use, errors against the published start, collapses."""
    published = results["published"]
    gaps = {SHOWN[name]: by_seed(results[name]["nmse"], published["nmse"]) for name in _OTHERS}
    known = {title: gap for title, gap in gaps.items() if gap is not None and gap.known}
    return {
        "idle": sum(used is None or used < _ALL for used in published["trained_used"]),
        "count": len(published["trained_used"]),
        "all": _ALL,
        "size": published["codebook_size"],
        "published": _use(results, "published"),
        "others": [_use(results, name) for name in _OTHERS],
        "known": bool(known),
        "lower": [title for title, gap in known.items() if gap.value < 0 and gap.clear],
        "provoked": [_use(results, name) for name in _PROVOKED],
    }


def _use(results: Results, name: str) -> dict[str, Any]:
    """A training's use of the codebook: means over the seeds, None where one is not finite."""
    entry = results[name]
    means = {
        key: mean(entry[key]) for key in ("trained_used", "coded_used", "trained_perplexity", "end_nmse")
    }
    first, last = (mean([series[at] for series in entry["perplexity_over_epochs"]]) for at in (0, -1))
    more = {"first": first, "last": last, "collapsed": collapsed(entry), "nmse": entry["nmse"]}
    return {"title": SHOWN[name], "size": entry["codebook_size"], **means, **more}
