"""The section about perplexity: of the compressed model, with and without adapter, and of the dense one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from pocketllm.report.charts import Chart, bars
from pocketllm.report.evaluations import Evaluation, Setting, same_model
from pocketllm.report.model_facts import AdapterFacts
from pocketllm.report.sections import Section
from pocketllm.report.tables import Columns, Table, short

_NOT_MEASURED = (
    "Not measured. Measure it with --ppl TEXT, here and on the dense model, or add the "
    "output of 'pocketllm eval --json' with --evaluation."
)


@dataclass(frozen=True)
class Subject:
    """What a page is about, to recognize evaluations of something else.

    folder, nbytes: of the compressed model, without the adapter. dense: names of the dense model, first the one
    that it was compressed by; '' stands for none.
    """

    folder: Path
    nbytes: int
    dense: Sequence[str]
    adapter: AdapterFacts | None = None


def perplexity_section(evaluations: Sequence[Evaluation], measure: str, subject: Subject) -> Section:
    """Perplexity of the compressed model and of the dense one. measure: the command that measures them."""
    title, values = "Perplexity", {"measure": measure, "has_dense": True, "doubts": []}
    if not evaluations:
        return Section("perplexity", title, values=values, absent=_NOT_MEASURED)
    dense = dense_figures(evaluations)
    table = Table.of("Perplexity per token; lower is better", _columns(dense), evaluations, words=3)
    values["has_dense"] = any(e.compressed and e.setting in dense for e in evaluations)
    values["doubts"] = [doubt for e in evaluations for doubt in _doubts(e, subject)]
    if not all(math.isfinite(e.perplexity) for e in evaluations):
        return Section("perplexity", title, tables=[table], values=values)
    return Section("perplexity", title, charts=[_chart(evaluations, table)], values=values)


def dense_figures(evaluations: Sequence[Evaluation]) -> dict[Setting, float]:
    """Setting -> perplexity of the dense model, the first that was given."""
    return {e.setting: e.perplexity for e in reversed(evaluations) if not e.compressed}


def _weights_of(evaluation: Evaluation) -> str:
    if not evaluation.compressed:
        return "dense"
    return "compressed, with adapter" if evaluation.adapter else "compressed"


def _columns(dense: dict[Setting, float]) -> Columns[Evaluation]:
    def times_dense(e: Evaluation) -> str:
        against = dense.get(e.setting)
        return f"{e.perplexity / against:.3f}×" if e.compressed and against else "–"

    return {
        "weights": _weights_of,
        "model": lambda e: f"{e.model} + {Path(e.adapter).name}" if e.adapter else e.model,
        "text": lambda e: Path(e.text).name or "–",
        "context": lambda e: str(e.context or "–"),
        "windows": lambda e: str(e.windows or "–"),
        "perplexity": lambda e: short(e.perplexity, 4),
        "times dense": times_dense,
    }


def _doubts(e: Evaluation, subject: Subject) -> Iterator[tuple[str, Evaluation, int | str | Path]]:
    """Why an evaluation may be of another model than the page, or with another adapter: (what about it, it, wanted)."""
    adapter = subject.adapter if e.adapter else None
    expected = subject.nbytes + (adapter.bytes if adapter else 0)
    if not e.compressed:
        if not any(same_model(e.model, name) for name in subject.dense if name):
            yield "dense", e, subject.dense[0]
    elif e.bytes_on_disk not in (0, expected):
        yield "bytes", e, expected
    else:
        if not same_model(e.model, str(subject.folder)):
            yield "folder", e, subject.folder
        if adapter and Path(e.adapter).name != adapter.name:
            yield "adapter", e, adapter.name


def _chart(evaluations: Sequence[Evaluation], table: Table) -> Chart:
    labels = [f"{_weights_of(e)}, {Path(e.text).name}" for e in evaluations]
    notes = [short(e.perplexity, 4) for e in evaluations]
    drawn = {"perplexity-bars": bars(labels, [e.perplexity for e in evaluations], notes)}
    figures = list(zip(labels, notes, strict=True))
    return Chart("perplexity-chart", "Perplexity", drawn, table, {"figures": figures})
