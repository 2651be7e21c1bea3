"""The sections of a page: title, charts and table columns. Their words are in `templates/NAME.html.j2`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from pocketllm.report.charts import Chart, bars, histogram
from pocketllm.report.heat_map import heat_charts
from pocketllm.report.model_facts import MatrixFacts, ModelFacts, grouped, mean
from pocketllm.report.tables import Columns, Table, megabytes, percent, short, thousands
from pocketllm.report.weight_distributions import WIDTH, Distribution, Moments, Weights


@dataclass(frozen=True)
class Section:
    """One part of the page.

    name: of its template and anchor. values: what the template needs. absent: why there is nothing to show.
    """

    name: str
    title: str
    charts: Sequence[Chart] = ()
    tables: Sequence[Table] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    absent: str = ""


ERRORS: Columns[MatrixFacts] = {
    "bits per weight": lambda m: short(m.bpw),
    "nmse": lambda m: short(m.nmse),
    "proxy error": lambda m: short(m.proxy_error),
}
MATRIX: Columns[MatrixFacts] = {
    "matrix": lambda m: m.name,
    "shape": lambda m: " × ".join(map(str, m.shape)),
    "d": lambda m: str(m.vector_len or "–"),
    "K": lambda m: str(m.codebook_size or "–"),
    "stride": lambda m: str(m.stride or "–"),
    "codebook": lambda m: str(m.codebook),
    **ERRORS,
    "used": lambda m: percent(m.utilization),
}
KIND: Columns[Sequence[MatrixFacts]] = {
    "kind": lambda group: group[0].kind,
    "matrices": lambda group: str(len(group)),
    "weights": lambda group: thousands(sum(m.weights for m in group)),
    "d": lambda group: _distinct(m.vector_len for m in group),
    "K": lambda group: _distinct(m.codebook_size for m in group),
    "bits per weight": lambda group: short(mean(group, lambda m: m.bpw)),
    "nmse": lambda group: short(mean(group, lambda m: m.nmse)),
    "proxy error": lambda group: short(mean(group, lambda m: m.proxy_error)),
}
MOMENTS: Columns[tuple[Distribution, str, Moments]] = {
    "kind": lambda row: row[0].kind,
    "weights": lambda row: row[1],
    "matrices": lambda row: f"{len(row[0].nmse)} of {row[0].of}",
    "mean": lambda row: short(row[2].mean),
    "rms": lambda row: short(row[2].rms),
    "largest": lambda row: short(row[2].largest),
    "kurtosis": lambda row: short(row[2].kurtosis),
    "nmse measured": lambda row: short(row[0].mean_nmse if row[1] == "decoded" else None),
}


def size_section(model: ModelFacts) -> Section:
    """Bytes on disk by part."""
    total = model.report["bytes_on_disk"]
    parts = {part.replace("_", " "): int(n) for part, n in model.report["bytes_by_part"].items()}
    shares = {part: f"{n / max(1, total):.1%}" for part, n in parts.items()}
    shown = [part for n, part in sorted(((n, part) for part, n in parts.items() if n), reverse=True)]
    drawn = bars(
        labels=shown,
        values=[float(parts[part]) for part in shown],
        notes=[f"{megabytes(parts[part])}, {shares[part]}" for part in shown],
    )
    rows = [(part, thousands(n), shares[part]) for part, n in parts.items()]
    rows.append(("all files", thousands(total), "100%"))
    table = Table("Bytes on disk by part", ("part", "bytes", "share"), rows)
    chart = Chart("size", "Bytes on disk", {"size": drawn}, table, {"parts": shown, "shares": shares})
    return Section("size", "Size by part", charts=[chart], values={"model": model})


def bits_section(model: ModelFacts) -> Section:
    """Bits per weight over depth and kind."""
    charts = heat_charts(
        model, name="bpw", title="Bits per weight", unit="bits per weight", value=lambda m: m.bpw
    )
    kinds = grouped(model.matrices, lambda m: m.kind).values()
    table = Table.of("By kind of matrix; means are weighted by size", KIND, kinds)
    return Section("bits", "Bits per weight", charts=charts, tables=[table], values={"model": model})


def error_section(model: ModelFacts) -> Section:
    """nmse, and proxy_error if the model was calibrated."""
    nmse = heat_charts(model, name="nmse", title="Error of the weights", unit="nmse", value=lambda m: m.nmse)
    proxy = heat_charts(
        model, name="proxy", title="Error of the outputs", unit="proxy error", value=lambda m: m.proxy_error
    )
    outside = Table.of("Outside the blocks", {"matrix": lambda m: m.name, **ERRORS}, model.outside)
    tables = [outside] if model.outside else []
    tables.append(Table.of("Every compressed matrix", MATRIX, model.matrices))
    values = {"model": model, "has_proxy": bool(proxy)}
    return Section("errors", "Errors", charts=[*nmse, *proxy], tables=tables, values=values)


def weights_section(model: ModelFacts, weights: Weights) -> Section:
    """Original and decoded weights, kind by kind."""
    title = "Distribution of the weights"
    if weights.absent:
        return Section("weights", title, absent=weights.absent)
    charts = [_histogram(number, distribution) for number, distribution in enumerate(weights.kinds)]
    rows = [(d, label, moments) for d in weights.kinds for label, moments in d.moments.items()]
    table = Table.of("Figures of the distributions (the kurtosis of a Gaussian is 3)", MOMENTS, rows, words=2)
    values = {
        "model": model,
        "weights": weights,
        "width": f"{WIDTH:g}",
        "seen": sum(len(d.nmse) for d in weights.kinds),
        "total": sum(d.of for d in weights.kinds),
    }
    return Section("weights", title, charts=charts, tables=[table], values=values)


def skipped_section(model: ModelFacts) -> Section:
    """Tensors left dense or not stored, by reason."""
    reasons: dict[str, list[str]] = {}
    for entry in model.report["skipped"]:
        reasons.setdefault(str(entry.get("reason", "not said")), []).append(str(entry["name"]))
    rows = [(reason, names[0], str(len(names))) for reason, names in reasons.items()]
    table = Table("Not compressed, by reason", ("reason", "for example", "tensors"), rows, words=2)
    return Section("dense", "Not compressed", tables=[table] if rows else [])


def _histogram(number: int, distribution: Distribution) -> Chart:
    d, name = distribution, f"weights-{number}"
    centres = [(low + high) / 2 for low, high in pairwise(d.edges)]
    rows = [
        (short(centre), f"{original:.2%}", f"{decoded:.2%}")
        for centre, original, decoded in zip(centres, d.original, d.decoded, strict=True)
    ]
    caption = f"{d.kind}: share of the weights in each bin"
    table = Table(caption, ("centre of bin", "original", "decoded"), rows, words=0)
    drawn = histogram(d.edges, d.original, d.decoded)
    return Chart(name, d.kind, {name: drawn}, table, {"distribution": d})


def _distinct(values: Iterable[int | None]) -> str:
    return ", ".join(str(value) for value in sorted({v for v in values if v is not None})) or "–"
