"""Are codebook and decoder small compared with the indices, and do longer vectors pay off with and without them?"""

from __future__ import annotations

import math
from collections.abc import Iterator

from pocketllm.config import CodecConfig
from pocketllm.plan import CODEWORD_BITS, ROW_SCALE_BITS
from pocketllm.studies.definition import Finding, Results, Values
from pocketllm.studies.measure.entries import Entry, grouped, select
from pocketllm.studies.show import plot
from pocketllm.studies.verdicts import holds, together

COUNTS = {
    "index_bpw": "indices alone",
    "bpw_shared": "all bits, codebook shared by the kind",
    "bpw_alone": "all bits, codebook for these rows alone",
}
"""Ways to count bits per weight: key of a point -> description."""
_SMALL = 0.1  # share of the bits of the indices below which codebook and decoder are concise
_BESIDE = 0.1  # bits beside those of the indices that a budget allows for scales, codebook and decoder
_PAPER = {"vector_len": 8, "codebook_size": 1 << 15, "rows": 4096, "columns": 11008}


def points(results: Results, what: str = "grid") -> list[Entry]:
    """The sizes tried on one matrix (`grid`), or on the compressed models (`model`)."""
    return sorted(select(results, what + ".{d}x{k}"), key=lambda p: (p["index_bpw"], p["vector_len"]))


def _cost(results: Results) -> Iterator[Values]:
    """Bits at the paper's size, which the claim is about; the same on the matrix under study, at the greatest K."""
    d, size, rows, columns = _PAPER.values()
    index = math.log2(size) / d
    beside = (CODEWORD_BITS * d * size + CodecConfig(vector_len=d).decoder_bits) / (rows * columns)
    paper = {"index": index, "beside": beside, "all": index + beside + ROW_SCALE_BITS / columns}
    here = max(points(results), key=lambda p: (p["codebook_size"], p["vector_len"] == 8, -p["vector_len"]))
    weights = here["matrix"]["rows"] * here["matrix"]["columns"]
    other = here["index_bpw"] + here["bits"]["row_scales"] / weights
    alone, shared = here["bpw_alone"] - other, here["bpw_shared"] - other
    found = {"weights": weights, "alone": alone, "shared": shared}
    here_too = [holds(part <= _SMALL * here["index_bpw"]) for part in (shared, alone)]
    yield {"paper": {**_PAPER, **paper}, "here": {**here, **found}, "here_too": together(here_too)}


def _lengths(results: Results) -> Iterator[Values]:
    by_rate = grouped(points(results), "index_bpw")
    yield {"lengths": {rate: (same[0], same[-1]) for rate, same in by_rate.items()}}


def _budgets(results: Results) -> Iterator[Values]:
    """The pair of least error within each budget of bits, as these are counted."""
    for key in ("bpw_shared", "bpw_alone"):
        budgets = [rate + _BESIDE for rate in grouped(points(results), "index_bpw")]
        affordable = {budget: [p for p in points(results) if p[key] <= budget] for budget in budgets}
        best = {budget: min(own, key=lambda p: p["nmse"]) for budget, own in affordable.items() if own}
        yield {"words": COUNTS[key], "best": best}


def _models(results: Results) -> Iterator[Values]:
    for rate, same in grouped(points(results, "model"), "index_bpw").items():
        yield {"rate": rate, "models": same, "dense": results["model.dense"]["perplexity"]}


FINDINGS = (
    Finding(
        "codebook and decoder are small beside the indices",
        _cost,
        lambda v: holds(v["paper"]["beside"] <= _SMALL * v["paper"]["index"]),
    ),
    Finding("longer vectors at equal bits of indices", _lengths),
    Finding("the least error within a budget", _budgets),
    Finding("the perplexity of compressed models", _models),
)


def picture(results: Results) -> plot.Picture:
    """Error over bits, counted in three ways; perplexity over all bits."""
    lengths = sorted({p["vector_len"] for p in points(results)})
    panels = [_errors(results, lengths, key, words) for key, words in COUNTS.items()]
    legend = plot.Legend({"fontsize": 9})
    return plot.Picture(13, 4.6, [plot.Part([[*panels, _perplexities(results, lengths)]], legend=legend)])


def _errors(results: Results, lengths: list[int], key: str, words: str) -> plot.Panel:
    """Error over the bits that `key` counts; a line for each vector length."""
    found = points(results)
    by_length = [sorted((p for p in found if p["vector_len"] == d), key=lambda p: p[key]) for d in lengths]
    top = max(p["index_bpw"] for p in found)
    bits = [n * top / 50 for n in range(1, 51)]
    marks = [
        plot.series(own, key, "nmse", plot.look(n), f"d = {lengths[n]}") for n, own in enumerate(by_length)
    ]
    bound = {"color": plot.INK, "ls": ":", "lw": 1, "label": "Gaussian bound"}
    marks.append(plot.mark("plot", bits, [4.0**-b for b in bits], **bound))
    lowest = min(p["nmse"] for p in found) / 2.5
    return plot.Panel(
        words.replace(", ", ",\n"),
        marks,
        plot.Axis("bits per weight", low=0, high=max(p[key] for p in found) + 0.25),
        plot.Axis("nmse" if key == "index_bpw" else "", "log", low=lowest, high=1),
        title_size=10.5,
    )


def _perplexities(results: Results, lengths: list[int]) -> plot.Panel:
    """Each compressed model as a point with its d and K."""
    dense, found = results["model.dense"]["perplexity"], points(results, "model")
    known = [p for p in found if p["perplexity"] is not None]
    marks: list[plot.Mark] = []
    for p in known:
        style = plot.look(lengths.index(p["vector_len"]))
        beside = {"xytext": (6, 3), "textcoords": "offset points", "fontsize": 8.5}
        name = f"{p['vector_len']}, {p['codebook_size']}"
        marks.append(plot.series([p], "bpw", "perplexity", style))
        marks.append(plot.mark("annotate", name, (p["bpw"], p["perplexity"]), **beside))
    if dense is not None:
        marks.append(plot.mark("axhline", dense, color=plot.INK, lw=1, ls="--"))
    values = [p["perplexity"] for p in known] + ([] if dense is None else [dense])
    few = bool(values) and max(values) / min(values) < 20
    bits = [p["bpw"] for p in found]
    return plot.Panel(
        "perplexity of the whole model\nwith (d, K); dashed: dense",
        marks,
        plot.Axis("all bits per weight of the blocks", low=min(bits) - 0.5, high=max(bits) + 0.75),
        plot.Axis(scale="log", minor=few, margin=0.15),
        title_size=10.5,
    )
