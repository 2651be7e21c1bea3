"""Numbers of the tables and picture of the study `codebook`."""

from __future__ import annotations

from typing import Any

from pocketllm.studies.claims.codebook_claim import COUNTS, Point, grid, groups, models
from pocketllm.studies.definition import Results
from pocketllm.studies.show.plot import INK, Axis, Label, Legend, Line, Mark, Panel, Part, Picture, Rule, look


def table_numbers(results: Results) -> dict[str, Any]:
    """For the tables: equal bits of indices, equal K, compressed models."""
    points = grid(results)
    return {
        "counts": COUNTS,
        "points": points,
        "equal_bits": groups(points, "index_bpw"),
        "equal_size": groups(points, "codebook_size"),
        "models": models(results),
    }


def picture(results: Results) -> Picture:
    """Error over bits, counted in three ways; perplexity over all bits."""
    panels = [_errors(results, key, words) for key, words in COUNTS.items()]
    return Picture(13, 4.6, [Part([[*panels, _perplexities(results)]], legend=Legend({"fontsize": 9}))])


def _lengths(results: Results) -> list[int]:
    return sorted({p["vector_len"] for p in grid(results)})


def _errors(results: Results, key: str, words: str) -> Panel:
    """Error over the bits that `key` counts; a line for each vector length."""
    points = grid(results)
    marks: list[Mark] = []
    for n, d in enumerate(_lengths(results)):
        own = sorted((p for p in points if p["vector_len"] == d), key=lambda p: p[key])
        marks.append(Line([p[key] for p in own], [p["nmse"] for p in own], look(n), f"d = {d}"))
    top = max(p["index_bpw"] for p in points)
    bits = [n * top / 50 for n in range(1, 51)]
    bound = [4.0**-b for b in bits]
    marks.append(Line(bits, bound, {"color": INK, "ls": ":", "lw": 1}, "Gaussian bound"))
    return Panel(
        words.replace(", ", ",\n"),
        marks,
        x=Axis("bits per weight", low=0, high=max(p[key] for p in points) + 0.25),
        y=Axis("nmse" if key == "index_bpw" else "", "log", low=min(p["nmse"] for p in points) / 2.5, high=1),
        title_size=10.5,
    )


def _perplexities(results: Results) -> Panel:
    """Each compressed model as a point with its d and K."""
    dense, lengths = results["model.dense"]["perplexity"], _lengths(results)
    known = [p for p in models(results) if p["perplexity"] is not None]
    marks = [mark for p in known for mark in _named_point(p, lengths.index(p["vector_len"]))]
    if dense is not None:
        marks.append(Rule(dense, {"color": INK, "lw": 1, "ls": "--"}))
    values = [p["perplexity"] for p in known] + ([] if dense is None else [dense])
    few = bool(values) and max(values) / min(values) < 20
    bits = [p["bpw"] for p in models(results)]
    return Panel(
        "perplexity of the whole model\nwith (d, K); dashed: dense",
        marks,
        x=Axis("all bits per weight of the blocks", low=min(bits) - 0.5, high=max(bits) + 0.75),
        y=Axis(scale="log", minor=few, margin=0.15),
        title_size=10.5,
    )


def _named_point(p: Point, n: int) -> list[Mark]:
    beside = {"xytext": (6, 3), "textcoords": "offset points", "fontsize": 8.5}
    name = f"{p['vector_len']}, {p['codebook_size']}"
    return [
        Line([p["bpw"]], [p["perplexity"]], look(n)),
        Label(name, p["bpw"], p["perplexity"], beside),
    ]
