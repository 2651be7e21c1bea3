"""What a report says, part by part: text, charts and tables, without any HTML."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pocketllm.report import charts
from pocketllm.report.charts import Chart, Table, short
from pocketllm.report.collect import MatrixFacts, ModelFacts, mean

Value = Callable[[MatrixFacts], float | None]


@dataclass(frozen=True)
class Section:
    """One part of the page. absent: why there is nothing to show. commands: for a shell, shown as such."""

    name: str
    title: str
    paragraphs: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    commands: tuple[str, ...] = ()
    absent: str = ""


def megabytes(nbytes: float) -> str:
    """Bytes as MB (10^6), or kB where that says more."""
    return f"{nbytes / 1e6:,.1f} MB" if nbytes >= 1e6 else f"{nbytes / 1e3:,.1f} kB"


def of_the_base(model: ModelFacts, what: str) -> list[str]:
    """A paragraph that says what is shown without the adapter; none where there is no adapter.

    Args:
        what: is shown, with its verb.
    """
    if model.adapter is None:
        return []
    return [f"{what} of the base alone: the adapter changes what is computed, not what is coded."]


def size_section(model: ModelFacts) -> Section:
    """Bytes on disk by part."""
    report = model.report
    total = report["bytes_on_disk"]
    parts = {part.replace("_", " "): int(n) for part, n in report["bytes_by_part"].items()}
    shown = sorted(((n, part) for part, n in parts.items() if n), reverse=True)
    shares = {part: f"{n / max(1, total):.1%}" for part, n in parts.items()}
    picture = charts.bars(
        "size",
        [part for _, part in shown],
        [float(n) for n, _ in shown],
        [f"{megabytes(n)}, {shares[part]}" for n, part in shown],
    )
    largest = f"the largest is {shown[0][1]} with {shares[shown[0][1]]}" if shown else "none has any bytes"
    table = Table(
        "Bytes on disk by part",
        ("part", "bytes", "share"),
        [(part, f"{n:,}", shares[part]) for part, n in parts.items()] + [("all files", f"{total:,}", "100%")],
    )
    description = f"Bar chart of {len(shown)} parts; {largest}."
    dense = report["dense_model_bytes_bf16"]
    return Section(
        "size",
        "Size by part",
        [
            f"All files together have {total:,} bytes ({megabytes(total)}); the dense weights in bf16 alone "
            f"would have {dense:,} ({megabytes(dense)}).",
            "Dense are the tensors that were not compressed, headers the descriptions in the weight files, "
            "config.json and pocketllm.json; other files are the tokenizer and the like.",
            *_counted(model),
        ],
        [Chart("size", "Bytes on disk", description, [picture], table)],
    )


def _counted(model: ModelFacts) -> list[str]:
    """That the adapter is counted, where there is one."""
    if model.adapter is None:
        return []
    base = model.report["bytes_on_disk"] - model.adapter.bytes
    return [
        f"The adapter {model.adapter.name} is counted with every file of its folder, {model.adapter.bytes:,} bytes "
        f"beside the {base:,} of the base; so it is in the ratios and the bits per weight."
    ]


def heat_chart(model: ModelFacts, name: str, title: str, unit: str, value: Value) -> Chart | None:
    """Depth × kind; None where no matrix in a block has the value."""
    grid = model.grid(value)
    pictures = charts.heat_map(f"heat-{name}", grid, model.kinds, unit)
    if not pictures:
        return None
    table = Table(
        f"{title}, by block and kind",
        ("block", *model.kinds),
        [(str(block), *(short(cell) for cell in row)) for block, row in enumerate(grid)],
    )
    cells = [
        (cell, block, kind)
        for block, row in enumerate(grid)
        for kind, cell in zip(model.kinds, row, strict=True)
        if cell is not None
    ]
    (low, low_block, low_kind), (high, high_block, high_kind) = min(cells), max(cells)
    description = (
        f"Heat map of {unit} over {model.blocks} blocks and {len(model.kinds)} kinds of matrices. "
        f"The least is {short(low)} ({low_kind}, block {low_block}), "
        f"the most {short(high)} ({high_kind}, block {high_block})."
    )
    return Chart(name, title, description, pictures, table)


def bits_section(model: ModelFacts) -> Section:
    """Bits per weight over depth and kind."""
    report = model.report
    chart = heat_chart(model, "bpw", "Bits per weight", "bits per weight", lambda m: m.bpw)
    return Section(
        "bits",
        "Bits per weight",
        [
            f"{short(report['bpw_matrices'])} bits per weight over all compressed matrices, "
            f"{short(report['bpw_blocks'])} over those in the blocks, {short(report['bpw_all'])} over every "
            "parameter. Everything stored is counted: indices, scales, and a matrix's share of its codebook "
            f"and decoder{', and the adapter, which serves all' if model.adapter else ''}. A dash marks what is not "
            "compressed.",
            *of_the_base(model, "The bits of single matrices and kinds are"),
        ],
        [chart] if chart else [],
        [kinds_table(model)],
    )


def kinds_table(model: ModelFacts) -> Table:
    """One row for each kind of matrix, those outside the blocks included."""
    kinds: dict[str, list[MatrixFacts]] = defaultdict(list)
    for matrix in model.matrices:
        kinds[matrix.kind].append(matrix)
    rows = [
        (
            kind,
            str(len(members)),
            f"{sum(m.weights for m in members):,}",
            _several(m.vector_len for m in members),
            _several(m.codebook_size for m in members),
            short(mean(members, lambda m: m.bpw)),
            short(mean(members, lambda m: m.nmse)),
            short(mean(members, lambda m: m.proxy_error)),
        )
        for kind, members in kinds.items()
    ]
    headers = ("kind", "matrices", "weights", "d", "K", "bits per weight", "nmse", "proxy error")
    return Table("By kind of matrix; means are weighted by size", headers, rows)


def error_section(model: ModelFacts) -> Section:
    """nmse, and proxy_error where the model was calibrated."""
    found = [
        heat_chart(model, "nmse", "Error of the weights", "nmse", lambda m: m.nmse),
        heat_chart(model, "proxy", "Error of the outputs", "proxy error", lambda m: m.proxy_error),
    ]
    paragraphs = [
        "nmse is the squared error of the weights over their squared size: 0 is perfect, 1 is as bad as all "
        "zeros."
    ]
    if found[1] is not None:
        paragraphs.append(
            "The proxy error is the same for what a layer puts out on the calibration text, the error that "
            "the model feels."
        )
    else:
        paragraphs.append("There is no proxy error: the model was compressed without calibration.")
    paragraphs += of_the_base(model, "These errors are")
    outside = [(m.name, short(m.bpw), short(m.nmse), short(m.proxy_error)) for m in model.outside]
    headers = ("matrix", "bits per weight", "nmse", "proxy error")
    tables = [Table("Outside the blocks", headers, outside)] if outside else []
    return Section("errors", "Errors", paragraphs, [c for c in found if c], [*tables, _every_matrix(model)])


def _every_matrix(model: ModelFacts) -> Table:
    rows = [
        (
            m.name,
            " × ".join(map(str, m.shape)),
            str(m.vector_len or "–"),
            str(m.codebook_size or "–"),
            str(m.stride or "–"),
            str(m.codebook),
            short(m.bpw),
            short(m.nmse),
            short(m.proxy_error),
            percent(m.utilization),
        )
        for m in model.matrices
    ]
    headers = (
        "matrix",
        "shape",
        "d",
        "K",
        "stride",
        "codebook",
        "bits per weight",
        "nmse",
        "proxy error",
        "used",
    )
    return Table("Every compressed matrix", headers, rows)


def _several(values: Any) -> str:
    return ", ".join(str(value) for value in sorted({v for v in values if v is not None})) or "–"


def percent(share: float | None) -> str:
    """A share as per cent, or a dash."""
    return "–" if share is None else f"{100 * share:.1f}%"
