"""Codebook usage, counted in the stored indices, and the section about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pocketllm.report.charts import Chart, bars, curves
from pocketllm.report.heat_map import heat_charts, short_kinds
from pocketllm.report.model_facts import MatrixFacts, ModelFacts, grouped, spread
from pocketllm.report.sections import Section
from pocketllm.report.tables import Columns, Table, percent, short, thousands
from pocketllm.runtime import Matrices

_STEPS = 101
_MOST_BARS = 12
_LINES = 3

Members = Mapping[int, Sequence[MatrixFacts]]  # codebook -> its matrices


@dataclass(frozen=True)
class CodebookUsage:
    """Usage of one codebook by the matrices whose indices were counted.

    covered: share of the indices that point to the most used 0 %, 1 %, …, 100 % of the codewords.
    used: share of the codewords with at least one index, in these matrices.
    """

    codebook: int
    covered: list[float]
    used: float


def count_usage(
    model: ModelFacts, progress: Callable[[float, str], None] = lambda share, detail: None
) -> list[CodebookUsage]:
    """Count the indices of up to 8 matrices of each kind and codebook, spread over the depth.

    Raises:
        FormatError: the compressed model is damaged.
    """
    matrices = Matrices.open(model.folder)
    groups = grouped(model.matrices, lambda m: (m.codebook, m.kind)).values()
    chosen = [matrix for group in groups for matrix in spread(group)]
    counts: dict[int, Tensor] = {}
    for number, matrix in enumerate(chosen):
        progress(number / len(chosen), matrix.name)
        size = model.layout.codebooks[matrix.codebook].size
        found = torch.bincount(matrices.codewords(matrix.name).flatten(), minlength=size)
        counts[matrix.codebook] = counts.get(matrix.codebook, 0) + found
    return [
        CodebookUsage(codebook=key, covered=_covered(count), used=float((count > 0).double().mean()))
        for key, count in counts.items()
    ]


def _covered(counts: Tensor) -> list[float]:
    """counts: int64 [K]. Returns: 101 shares, linearly interpolated between the codewords."""
    total = counts.sort(descending=True).values.double().cumsum(0) / counts.sum()
    points = torch.cat([torch.zeros(1, dtype=torch.float64), total])
    place = torch.linspace(0, len(counts), _STEPS, dtype=torch.float64)
    low = place.floor().long().clamp(max=len(counts) - 1)
    part = place - low
    return (points[low] * (1 - part) + points[low + 1] * part).tolist()


def codebooks_section(model: ModelFacts, usages: Sequence[CodebookUsage]) -> Section:
    """The share of each codebook that is used, and how evenly."""
    members = dict(sorted(grouped(model.matrices, lambda m: m.codebook).items()))
    table = Table.of("Codebook usage", _columns(model), members.values(), words=2)
    used = _used_charts(model, members, table)
    return Section(
        "codebooks",
        "Codebooks",
        charts=[*used, *_evenness_charts(members, usages)],
        tables=[] if used else [table],
        values={
            "codebooks": len(members),
            "matrices": len(model.matrices),
            "chosen_of": len(usages) if len(usages) > _LINES else 0,
        },
    )


def _columns(model: ModelFacts) -> Columns[Sequence[MatrixFacts]]:
    """Columns of a table with one row for the matrices of each codebook."""

    def size(group: Sequence[MatrixFacts]) -> int:
        return model.layout.codebooks[group[0].codebook].size

    def evenness(group: Sequence[MatrixFacts]) -> float | None:
        perplexity = group[0].codebook_perplexity
        return None if perplexity is None else perplexity / size(group)

    return {
        "codebook": lambda group: str(group[0].codebook),
        "kinds": lambda group: ", ".join(dict.fromkeys(m.kind for m in group)),
        "matrices": lambda group: str(len(group)),
        "K": lambda group: thousands(size(group)),
        "d": lambda group: str(model.layout.codebooks[group[0].codebook].vector_len),
        "used": lambda group: percent(group[0].utilization),
        "perplexity": lambda group: short(group[0].codebook_perplexity),
        "perplexity / K": lambda group: percent(evenness(group)),
    }


def _label(group: Sequence[MatrixFacts]) -> str:
    kinds = list(dict.fromkeys(m.kind for m in group))
    who = short_kinds(kinds)[0] if len(kinds) == 1 else f"{len(kinds)} kinds"
    return f"{group[0].codebook}: {who}, {len(group)} {'matrix' if len(group) == 1 else 'matrices'}"


def _used_charts(model: ModelFacts, members: Members, table: Table) -> list[Chart]:
    """Bars for few codebooks, a heat map for many; none where the use is not known."""
    shares = [group[0].utilization for group in members.values()]
    known = [share for share in shares if share is not None]
    if not known or len(known) < len(shares):
        return []
    title, facts = "Codewords in use", {"count": len(known), "least": min(known), "most": max(known)}
    if len(known) <= _MOST_BARS:
        drawn = bars(
            labels=[_label(group) for group in members.values()],
            values=[100 * share for share in known],
            notes=[percent(share) for share in known],
        )
        return [Chart("use", title, {"use": drawn}, table, {"used": facts})]

    def used(m: MatrixFacts) -> float | None:
        return None if m.utilization is None else 100 * m.utilization

    heat = heat_charts(model, name="use", title=title, unit="codewords in use, %", value=used)
    return [replace(chart, table=table, facts={"used": facts, "heat": chart.facts}) for chart in heat]


def _evenness_charts(members: Members, usages: Sequence[CodebookUsage]) -> list[Chart]:
    """Up to three codebooks; of more, the least even, the middle and the most even one."""
    if not usages:
        return []
    ordered = sorted(usages, key=lambda usage: -sum(usage.covered))
    if len(ordered) > _LINES:
        ordered = [ordered[0], ordered[len(ordered) // 2], ordered[-1]]
    lines = {_label(members[u.codebook]): [100 * share for share in u.covered] for u in ordered}
    drawn = curves(
        series=lines,
        x_label="most used codewords, % of the codebook",
        y_label="indices that point to them, %",
        diagonal="all used equally",
    )
    rows = [(f"{n}%", *(f"{values[n]:.1f}%" for values in lines.values())) for n in range(0, _STEPS, 10)]
    caption = "Share of the indices by most used codewords"
    table = Table(caption, ("codewords", *lines), rows, words=0)
    facts = {"tenths": {label: f"{values[10]:.0f}" for label, values in lines.items()}}
    return [Chart("evenness", "How evenly codewords are used", {"evenness": drawn}, table, facts)]
