"""What the study `codebook` shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from pocketllm.config import CodecConfig
from pocketllm.plan import CODEWORD_BITS, ROW_SCALE_BITS
from pocketllm.studies.study import Results, Table
from pocketllm.studies.style import INK, look, number, plain_ticks

Point = Mapping[str, Any]
COUNTS: dict[str, tuple[str, Callable[[Point], float]]] = {
    "index_bpw": ("indices alone", lambda p: p["index_bpw"]),
    "bpw_shared": ("all bits, codebook shared by the kind", lambda p: p["bpw_shared"]),
    "bpw_alone": ("all bits, codebook for these rows alone", lambda p: p["bpw_alone"]),
}
_SMALL = 0.1  # of the bits of the indices: what is concise beside them
_BESIDE = 0.1  # bits beside those of the indices that a budget allows for scales, codebook and decoder
_PAPER = (8, 1 << 15, 4096, 11008)  # d, K, rows, columns


def _grid(results: Results) -> list[Point]:
    found = [value for key, value in results.items() if key.startswith("grid.")]
    return sorted(found, key=lambda p: (p["index_bpw"], p["vector_len"]))


def _models(results: Results) -> list[Point]:
    """The whole models, dense left out."""
    found = [v for key, v in results.items() if key.startswith("model.") and key != "model.dense"]
    return sorted(found, key=lambda p: (p["index_bpw"], p["vector_len"]))


def _groups(points: list[Point], key: str) -> dict[float, list[Point]]:
    """Points alike in `key`, where there are at least two."""
    found: dict[float, list[Point]] = {}
    for point in points:
        found.setdefault(point[key], []).append(point)
    return {value: alike for value, alike in sorted(found.items()) if len(alike) > 1}


def tables(results: Results) -> list[Table]:
    """Equal bits of indices, equal K, whole models."""
    points = _grid(results)
    facts = points[0]["matrix"]
    note = (
        f"{facts['rows']} rows of `{facts['name']}`; a kind has {points[0]['shared_by']} matrices. Predicted: the best "
        "K points in d dimensions for Gaussian numbers, asymptotically. Bound: for Gaussian numbers at the bits of the "
        "indices."
    )
    header = [
        "d",
        "K",
        *(words for words, _ in COUNTS.values()),
        "nmse",
        "k-means nmse",
        "predicted",
        "bound",
    ]
    rows = [_row(point) for alike in _groups(points, "index_bpw").values() for point in alike]
    same = [
        _row(p)
        for alike in _groups(points, "codebook_size").values()
        for p in sorted(alike, key=lambda p: p["vector_len"])
    ]
    return [
        Table("At equal bits of indices", header, rows, note),
        Table("At equal K", header, same, "As above."),
        _whole(results),
    ]


def _row(p: Point) -> list[str]:
    return [
        str(p["vector_len"]),
        str(p["codebook_size"]),
        *(f"{count(p):.2f}" for _, count in COUNTS.values()),
        number(p["nmse"]),
        number(p["kmeans_nmse"]),
        number(p["predicted_nmse"]),
        number(4.0 ** -p["index_bpw"]),
    ]


def _whole(results: Results) -> Table:
    dense = results["model.dense"]
    rows = [["dense", "", "", "", "", number(dense["perplexity"], 4)]]
    for p in _models(results):
        cells = [f"{p['index_bpw']:.2f}", f"{p['bpw']:.2f}", number(p["nmse"]), number(p["perplexity"], 4)]
        rows.append([str(p["vector_len"]), str(p["codebook_size"]), *cells])
    note = (
        f"{dense['text']}, context {dense['context']}, first {dense['windows']} windows, in {dense['dtype']}. All "
        "bits: of the linear layers of all blocks, with a codebook for each kind; embedding and head are dense."
    )
    header = ["d", "K", "index bits", "all bits", "nmse", "perplexity"]
    return Table("The whole model, not calibrated", header, rows, note)


def findings(results: Results) -> list[str]:
    """What the codebook costs, and whether longer vectors pay, before and after that cost."""
    points = _grid(results)
    return [_cost_words(points), _length_words(points), *_budget_words(points), *_perplexity_words(results)]


def _cost_words(points: list[Point]) -> str:
    """The share of codebook and decoder at the paper's size, which the claim is about, and on this matrix."""
    d, size, rows, columns = _PAPER
    index, scales = math.log2(size) / d, ROW_SCALE_BITS / columns
    beside = (CODEWORD_BITS * d * size + CodecConfig(vector_len=d).decoder_bits) / (rows * columns)
    held = "Held" if beside <= _SMALL * index else "Did not hold"
    return (
        f"{held} at the paper's size, which is a matter of counting: for d = {d}, K = {size} and {rows} × {columns} "
        f"weights codebook and decoder take {beside:.3f} bits per weight beside {index:.3f} of indices, "
        f"{index + beside + scales:.2f} with the row scales, though no other matrix shares them. "
        f"{_here_words(points)}"
    )


def _here_words(points: list[Point]) -> str:
    """The same of the matrix under study, at the greatest K."""
    p = max(points, key=lambda p: (p["codebook_size"], p["vector_len"] == 8, -p["vector_len"]))
    weights = p["matrix"]["rows"] * p["matrix"]["columns"]
    index, scales = p["index_bpw"], p["bits"]["row_scales"] / weights
    alone, shared = (p[key] - index - scales for key in ("bpw_alone", "bpw_shared"))
    if alone <= _SMALL * index:
        verdict = "it held, too"
    elif shared <= _SMALL * index:
        verdict = "it held only where matrices share a codebook"
    else:
        verdict = "it did not hold, shared or not"
    return (
        f"On the matrix here, of {weights / 1e6:.2g} million weights, {verdict}: at d = {p['vector_len']}, K = "
        f"{p['codebook_size']} they take {alone:.2f} beside {index:.2f} where they serve it alone, {shared:.3f} where "
        f"the {p['shared_by']} matrices of the kind share them."
    )


def _length_words(points: list[Point]) -> str:
    told = []
    for rate, alike in _groups(points, "index_bpw").items():
        short, long = min(alike, key=lambda p: p["vector_len"]), max(alike, key=lambda p: p["vector_len"])
        told.append(
            f"{rate:g} bits: {number(short['nmse'])} at d = {short['vector_len']}, {number(long['nmse'])} at d = "
            f"{long['vector_len']}"
        )
    return f"Longer vectors at equal bits of indices, nmse: {'; '.join(told)}."


def _budget_words(points: list[Point]) -> list[str]:
    """The pair of least error within each budget of bits, by how bits are counted."""
    found = []
    for key in ("bpw_shared", "bpw_alone"):
        words, count = COUNTS[key]
        told = []
        for budget in (rate + _BESIDE for rate in _groups(points, "index_bpw")):
            affordable = [p for p in points if count(p) <= budget]
            if affordable:
                p = min(affordable, key=lambda p: p["nmse"])
                pair = f"d = {p['vector_len']}, K = {p['codebook_size']}"
                told.append(f"{budget:g}: {pair} ({number(p['nmse'])})")
        found.append(f"Least error within a budget of bits, {words}: {'; '.join(told)} (nmse).")
    return found


def _perplexity_words(results: Results) -> list[str]:
    dense, found = results["model.dense"]["perplexity"], []
    for rate, alike in _groups(_models(results), "index_bpw").items():
        told = ", ".join(
            f"{number(p['perplexity'], 4)} at d = {p['vector_len']} ({p['bpw']:.2f} bits with everything)"
            for p in alike
        )
        found.append(
            f"Perplexity of the whole model at {rate:g} bits of indices: {told}; dense {number(dense, 4)}."
        )
    return found


def draw(results: Results, figure: Any) -> None:
    """Error over bits, counted in three ways; perplexity over all bits."""
    figure.set_size_inches(13, 4.6)
    axes = figure.subplots(1, 4)
    points = _grid(results)
    lengths = sorted({p["vector_len"] for p in points})
    for place, (words, count) in zip(axes[:3], COUNTS.values(), strict=True):
        for n, d in enumerate(lengths):
            own = sorted((p for p in points if p["vector_len"] == d), key=count)
            place.plot([count(p) for p in own], [p["nmse"] for p in own], label=f"d = {d}", **look(n))
        top = max(p["index_bpw"] for p in points)
        bits = [n * top / 50 for n in range(1, 51)]
        place.plot(bits, [4.0**-b for b in bits], color=INK, ls=":", lw=1, label="Gaussian bound")
        place.set_yscale("log")
        plain_ticks(place.yaxis)
        place.set_ylim(min(p["nmse"] for p in points) / 2.5, 1)
        place.set_xlim(0, max(count(p) for p in points) + 0.25)
        place.set_title(words.replace(", ", ",\n"), fontsize=10.5)
        place.set_xlabel("bits per weight")
    axes[0].set_ylabel("nmse")
    _draw_perplexity(axes[3], results, lengths)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=9, frameon=False)


def _draw_perplexity(axes: Any, results: Results, lengths: list[int]) -> None:
    for p in _models(results):
        if p["perplexity"] is not None:
            axes.plot([p["bpw"]], [p["perplexity"]], **look(lengths.index(p["vector_len"])))
            label, place = f"{p['vector_len']}, {p['codebook_size']}", (p["bpw"], p["perplexity"])
            axes.annotate(label, place, xytext=(6, 3), textcoords="offset points", fontsize=8.5)
    dense = results["model.dense"]["perplexity"]
    if dense is not None:
        axes.axhline(dense, color=INK, lw=1, ls="--")
    known = [
        p["perplexity"] for p in (*_models(results), results["model.dense"]) if p["perplexity"] is not None
    ]
    axes.set_yscale("log")
    plain_ticks(axes.yaxis, minor=bool(known) and max(known) / min(known) < 20)
    axes.margins(y=0.15)
    bits = [p["bpw"] for p in _models(results)]
    axes.set_xlim(min(bits) - 0.5, max(bits) + 0.75)
    axes.set_title("perplexity of the whole model\nwith (d, K); dashed: dense", fontsize=10.5)
    axes.set_xlabel("all bits per weight of the blocks")
