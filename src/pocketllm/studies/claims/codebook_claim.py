"""Are codebook and decoder small compared with the indices, and do longer vectors pay off with and without them?"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from pocketllm.config import CodecConfig
from pocketllm.plan import CODEWORD_BITS, ROW_SCALE_BITS
from pocketllm.studies.definition import Results

Point = Mapping[str, Any]
COUNTS = {
    "index_bpw": "indices alone",
    "bpw_shared": "all bits, codebook shared by the kind",
    "bpw_alone": "all bits, codebook for these rows alone",
}
"""Ways to count bits per weight: key of a point -> description."""
_SMALL = 0.1  # share of the bits of the indices below which codebook and decoder are concise
_BESIDE = 0.1  # bits beside those of the indices that a budget allows for scales, codebook and decoder
_PAPER = {"d": 8, "size": 1 << 15, "rows": 4096, "columns": 11008}


def grid(results: Results) -> list[Point]:
    """The sizes tried on one matrix."""
    return _ordered(value for key, value in results.items() if key.startswith("grid."))


def models(results: Results) -> list[Point]:
    """The compressed models."""
    return _ordered(v for key, v in results.items() if key.startswith("model.") and key != "model.dense")


def _ordered(points: Iterable[Point]) -> list[Point]:
    return sorted(points, key=lambda p: (p["index_bpw"], p["vector_len"]))


def groups(points: list[Point], key: str) -> dict[float, list[Point]]:
    """Points that have the same value at `key`, where there are at least two."""
    found: dict[float, list[Point]] = {}
    for point in points:
        found.setdefault(point[key], []).append(point)
    return {value: same for value, same in sorted(found.items()) if len(same) > 1}


def numbers(results: Results) -> dict[str, Any]:
    """For the findings: the cost of the codebook, the gain of length, the best within a budget, perplexities."""
    points = grid(results)
    by_rate = groups(points, "index_bpw")
    lengths = {
        rate: [how(same, key=lambda p: p["vector_len"]) for how in (min, max)]
        for rate, same in by_rate.items()
    }
    return {
        "paper": _paper(),
        "here": _here(points),
        "lengths": lengths,
        "budgets": {COUNTS[key]: _budgets(points, key) for key in ("bpw_shared", "bpw_alone")},
        "models": groups(models(results), "index_bpw"),
        "dense": results["model.dense"]["perplexity"],
    }


def _paper() -> dict[str, Any]:
    """Bits at the paper's size, which the claim is about."""
    d, size, rows, columns = _PAPER.values()
    index, scales = math.log2(size) / d, ROW_SCALE_BITS / columns
    beside = (CODEWORD_BITS * d * size + CodecConfig(vector_len=d).decoder_bits) / (rows * columns)
    bits = {"index": index, "beside": beside, "all": index + beside + scales}
    return {**_PAPER, **bits, "held": beside <= _SMALL * index}


def _here(points: list[Point]) -> dict[str, Any]:
    """The same on the matrix under study, at the greatest K."""
    p = max(points, key=lambda p: (p["codebook_size"], p["vector_len"] == 8, -p["vector_len"]))
    weights = p["matrix"]["rows"] * p["matrix"]["columns"]
    other = p["index_bpw"] + p["bits"]["row_scales"] / weights
    alone, shared = (p[key] - other for key in ("bpw_alone", "bpw_shared"))
    limit = _SMALL * p["index_bpw"]
    held = "alone" if alone <= limit else "shared" if shared <= limit else "no"
    return {**p, "weights": weights, "alone": alone, "shared": shared, "held": held}


def _budgets(points: list[Point], key: str) -> list[tuple[float, Point]]:
    """The pair of least error within each budget of bits, as these are counted by `key`."""
    found = []
    for budget in (rate + _BESIDE for rate in groups(points, "index_bpw")):
        affordable = [p for p in points if p[key] <= budget]
        if affordable:
            found.append((budget, min(affordable, key=lambda p: p["nmse"])))
    return found
