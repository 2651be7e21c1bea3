"""The parts of a report that need more than the model's own files: weights and perplexity."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from pocketllm.report import charts
from pocketllm.report.charts import Chart, Table, short
from pocketllm.report.collect import AdapterFacts, ModelFacts
from pocketllm.report.evaluations import Evaluation, same_model
from pocketllm.report.sections import Section, of_the_base
from pocketllm.report.weights import WIDTH, Distribution, Moments, Weights


def weights_section(model: ModelFacts, weights: Weights) -> Section:
    """Original and decoded weights, kind by kind."""
    title = "Distribution of the weights"
    if weights.absent:
        return Section("weights", title, absent=weights.absent)
    partial = [d for d in weights.kinds if len(d.nmse) < d.of]
    paragraphs = [
        f"Weights of the dense model ({weights.source}) and what the compressed one decodes to. The axis "
        f"ends at {WIDTH:g} times the root mean square of all the original weights shown there; what lies "
        "beyond is counted in the outermost bins."
    ]
    if partial:
        seen = sum(len(d.nmse) for d in weights.kinds)
        paragraphs.append(f"{seen} of {sum(d.of for d in weights.kinds)} matrices, spread over the depth.")
    paragraphs += of_the_base(model, "The decoded weights are those")
    if weights.mismatch:
        paragraphs.append(f"Mind: {weights.mismatch}")
    found = [_histogram(n, distribution) for n, distribution in enumerate(weights.kinds)]
    return Section("weights", title, paragraphs, found, [_moments(weights.kinds)])


def _histogram(number: int, distribution: Distribution) -> Chart:
    edges, name = distribution.edges, f"weights-{number}"
    centres = [(low + high) / 2 for low, high in pairwise(edges)]
    rows = [
        (short(centre), f"{a:.2%}", f"{b:.2%}")
        for centre, a, b in zip(centres, distribution.original, distribution.decoded, strict=True)
    ]
    caption = f"{distribution.kind}: share of the weights in each bin"
    original, decoded = distribution.moments
    description = (
        f"Histograms of {distribution.kind}: original with root mean square {short(original.rms)} and "
        f"largest magnitude {short(original.largest)}, decoded with {short(decoded.rms)} and "
        f"{short(decoded.largest)}."
    )
    picture = charts.histogram(name, edges, distribution.original, distribution.decoded)
    table = Table(caption, ("centre of bin", "original", "decoded"), rows, words=0)
    return Chart(name, distribution.kind, description, [picture], table)


def _moments(kinds: Sequence[Distribution]) -> Table:
    rows = []
    for distribution in kinds:
        count = f"{len(distribution.nmse)} of {distribution.of}"
        error = sum(distribution.nmse.values()) / len(distribution.nmse)
        for label, moments in zip(("original", "decoded"), distribution.moments, strict=True):
            nmse = short(error) if label == "decoded" else "–"
            rows.append((distribution.kind, label, count, *_figures(moments), nmse))
    headers = ("kind", "weights", "matrices", "mean", "rms", "largest", "kurtosis", "nmse found")
    return Table("Figures of the distributions (the kurtosis of a Gaussian is 3)", headers, rows, words=2)


def _figures(moments: Moments) -> tuple[str, str, str, str]:
    return short(moments.mean), short(moments.rms), short(moments.largest), short(moments.kurtosis)


@dataclass(frozen=True)
class Subject:
    """What a page is of, to tell evaluations of something else.

    folder, nbytes: of the compressed model, without the adapter. dense: names of the dense model, first the one
    that it was compressed by; '' stands for none.
    """

    folder: Path
    nbytes: int
    dense: Sequence[str]
    adapter: AdapterFacts | None = None


def perplexity_section(evaluations: Sequence[Evaluation], command: str, subject: Subject) -> Section:
    """Perplexity of the compressed model beside the dense one. command: how to measure it."""
    title = "Perplexity"
    if not evaluations:
        return Section(
            "perplexity",
            title,
            absent="Not measured. Measure it with --ppl TEXT, here and on the dense model, or add the "
            "output of 'pocketllm eval --json' with --evaluation.",
            commands=(command,),
        )
    table = _perplexities(evaluations)
    paragraphs = ["Figures may be compared only on the same text, context length and number of windows."]
    dense = {e.setting for e in evaluations if not e.compressed}
    if not any(e.compressed and e.setting in dense for e in evaluations):
        paragraphs.append(
            "There is no figure of the dense model in the same setting. Name that model with --against, or "
            "add its evaluation with --evaluation."
        )
    for e in evaluations:
        doubts = _doubts(e, subject) if e.compressed else _doubts_of_dense(e, subject)
        paragraphs += [f"Mind: {doubt}" for doubt in doubts]
    if not all(math.isfinite(e.perplexity) for e in evaluations):
        return Section("perplexity", title, paragraphs, tables=[table])
    return Section("perplexity", title, paragraphs, [_perplexity_chart(evaluations, table)])


def _weights_of(evaluation: Evaluation) -> str:
    if not evaluation.compressed:
        return "dense"
    return "compressed, with adapter" if evaluation.adapter else "compressed"


def dense_figures(evaluations: Sequence[Evaluation]) -> dict[tuple[str, int, int, int], float]:
    """Setting -> perplexity of the dense model, the first that was given."""
    return {e.setting: e.perplexity for e in reversed(evaluations) if not e.compressed}


def _perplexities(evaluations: Sequence[Evaluation]) -> Table:
    dense, rows = dense_figures(evaluations), []
    for e in evaluations:
        against = dense.get(e.setting)
        rows.append(
            (
                _weights_of(e),
                f"{e.model} + {Path(e.adapter).name}" if e.adapter else e.model,
                Path(e.text).name or "–",
                str(e.context or "–"),
                str(e.windows or "–"),
                short(e.perplexity, 4),
                f"{e.perplexity / against:.3f}×" if e.compressed and against else "–",
            )
        )
    headers = ("weights", "model", "text", "context", "windows", "perplexity", "times dense")
    return Table("Perplexity per token; lower is better", headers, rows, words=3)


def _doubts(e: Evaluation, subject: Subject) -> list[str]:
    """Why an evaluation may be of another model than the page, or of the same with another adapter."""
    adapter = subject.adapter if e.adapter else None
    expected = subject.nbytes + (adapter.bytes if adapter else 0)
    if e.bytes_on_disk not in (0, expected):
        return [f"the evaluation of {e.model} is of {e.bytes_on_disk:,} bytes, this model has {expected:,}."]
    doubts = []
    if not same_model(e.model, str(subject.folder)):
        doubts.append(
            f"the evaluation is of {e.model}, which from here is not the folder of this model ({subject.folder}); "
            "see that the two are the same."
        )
    if adapter and Path(e.adapter).name != adapter.name:
        doubts.append(
            f"the evaluation of {e.model} is with the adapter {e.adapter}, not with {adapter.name}."
        )
    return doubts


def _doubts_of_dense(e: Evaluation, subject: Subject) -> list[str]:
    """Why an evaluation may be of another dense model than the one that was compressed."""
    if any(same_model(e.model, name) for name in subject.dense if name):
        return []
    return [f"the dense figure is of {e.model}, this model was compressed from {subject.dense[0]}."]


def _perplexity_chart(evaluations: Sequence[Evaluation], table: Table) -> Chart:
    labels = [f"{_weights_of(e)}, {Path(e.text).name}" for e in evaluations]
    notes = [short(e.perplexity, 4) for e in evaluations]
    picture = charts.bars("perplexity-bars", labels, [e.perplexity for e in evaluations], notes)
    words = "; ".join(f"{label}: {note}" for label, note in zip(labels, notes, strict=True))
    return Chart("perplexity-chart", "Perplexity", f"Bar chart. {words}.", [picture], table)
