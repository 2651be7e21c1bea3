"""How the codewords of each codebook are used: from the stored indices themselves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pocketllm.report import charts
from pocketllm.report.charts import Chart, Table
from pocketllm.report.collect import MatrixFacts, ModelFacts, spread
from pocketllm.report.sections import Section, heat_chart, percent
from pocketllm.runtime import Matrices

_MOST_BARS = 12
_STEPS = 101
_LINES = 3


@dataclass(frozen=True)
class Use:
    """Use of one codebook by the matrices that were looked at.

    covered: share of the indices that point to the most used 0 %, 1 %, …, 100 % of the codewords.
    used: share of the codewords with at least one index, in these matrices.
    """

    codebook: int
    covered: list[float]
    used: float


def count_use(
    model: ModelFacts, progress: Callable[[float, str], None] = lambda share, detail: None
) -> list[Use]:
    """Count the indices of up to 8 matrices of each kind and codebook, spread over the depth.

    Raises:
        FormatError: the compressed model is damaged.
    """
    matrices = Matrices.open(model.folder)
    groups = defaultdict(list)
    for matrix in model.matrices:
        groups[matrix.codebook, matrix.kind].append(matrix)
    chosen = [m for group in groups.values() for m in spread(group)]
    counts: dict[int, Tensor] = {}
    for number, matrix in enumerate(chosen):
        progress(number / len(chosen), matrix.name)
        size = model.layout.codebooks[matrix.codebook].size
        found = torch.bincount(matrices.indices(matrix.name).flatten(), minlength=size)
        counts[matrix.codebook] = counts.get(matrix.codebook, torch.zeros(size, dtype=torch.int64)) + found
    return [Use(key, _covered(count), float((count > 0).double().mean())) for key, count in counts.items()]


def _covered(counts: Tensor) -> list[float]:
    """counts: int64 [K]. Returns: 101 shares, between the codewords by straight lines."""
    total = counts.sort(descending=True).values.double().cumsum(0) / counts.sum()
    points = torch.cat([torch.zeros(1, dtype=torch.float64), total])
    place = torch.linspace(0, len(counts), _STEPS, dtype=torch.float64)
    low = place.floor().long().clamp(max=len(counts) - 1)
    part = place - low
    return (points[low] * (1 - part) + points[low + 1] * part).tolist()


def use_section(model: ModelFacts, uses: Sequence[Use]) -> Section:
    """How much of each codebook is used, and how evenly."""
    members: dict[int, list[MatrixFacts]] = defaultdict(list)
    for matrix in model.matrices:
        members[matrix.codebook].append(matrix)
    many = "s" * (len(members) != 1)
    paragraphs = [
        f"{len(members)} codebook{many} for {len(model.matrices)} matrices. Used is the share of codewords "
        "that some subvector points to. The perplexity of use counts codewords by how evenly they are used; "
        "at 100 % of K all are used alike."
    ]
    table = _table(model, members)
    shares = [members[number][0].utilization for number in sorted(members)]
    found = [_use_chart(model, members, shares, table), _covered_chart(model, members, uses)]
    tables = [] if found[0] else [table]
    return Section("codebooks", "Codebooks", paragraphs, [c for c in found if c], tables)


def _table(model: ModelFacts, members: dict[int, list[MatrixFacts]]) -> Table:
    rows = []
    for number, group in sorted(members.items()):
        first, entry = group[0], model.layout.codebooks[number]
        perplexity = first.codebook_perplexity
        rows.append(
            (
                str(number),
                ", ".join(dict.fromkeys(m.kind for m in group)),
                str(len(group)),
                f"{entry.size:,}",
                str(entry.vector_len),
                percent(first.utilization),
                charts.short(perplexity),
                percent(None if perplexity is None else perplexity / entry.size),
            )
        )
    headers = ("codebook", "kinds", "matrices", "K", "d", "used", "perplexity", "perplexity / K")
    return Table("Use of the codebooks", headers, rows, words=2)


def _label(number: int, group: Sequence[MatrixFacts]) -> str:
    kinds = list(dict.fromkeys(m.kind for m in group))
    who = charts.short_kinds(kinds)[0] if len(kinds) == 1 else f"{len(kinds)} kinds"
    return f"{number}: {who}, {len(group)} {'matrix' if len(group) == 1 else 'matrices'}"


def _use_chart(
    model: ModelFacts, members: dict[int, list[MatrixFacts]], shares: Sequence[float | None], table: Table
) -> Chart | None:
    """Bars for few codebooks, a heat map for many; None where the use is not known."""
    known = [share for share in shares if share is not None]
    if not known or len(known) < len(shares):
        return None
    extremes = f"{percent(min(known))} to {percent(max(known))}"
    words = f"Share of codewords in use, {len(shares)} codebooks: {extremes}."
    if len(shares) <= _MOST_BARS:
        labels = [_label(number, members[number]) for number in sorted(members)]
        picture = charts.bars("use", labels, [100 * s for s in known], [percent(s) for s in known])
        return Chart("use", "Codewords in use", f"Bar chart. {words}", [picture], table)
    unit = "codewords in use, %"
    heat = heat_chart(
        model, "use", unit, unit, lambda m: None if m.utilization is None else 100 * m.utilization
    )
    if heat is None:
        return None
    return Chart("use", "Codewords in use", f"{heat.description} {words}", heat.pictures, table)


def _covered_chart(
    model: ModelFacts, members: dict[int, list[MatrixFacts]], uses: Sequence[Use]
) -> Chart | None:
    """Up to three codebooks; of more, the least even, the middle and the most even one."""
    if not uses:
        return None
    ordered = sorted(uses, key=lambda use: -sum(use.covered))
    if len(ordered) > _LINES:
        ordered = [ordered[0], ordered[len(ordered) // 2], ordered[-1]]
    lines = [
        (_label(use.codebook, members[use.codebook]), [100 * share for share in use.covered])
        for use in ordered
    ]
    labels = ("most used codewords, % of the codebook", "indices that point to them, %")
    rows = [(f"{step}%", *(f"{values[step]:.1f}%" for _, values in lines)) for step in range(0, _STEPS, 10)]
    chosen = (
        ""
        if len(uses) <= _LINES
        else f" Of {len(uses)} codebooks: the least even, a middle one, the most even."
    )
    words = "; ".join(f"{label}: the most used tenth takes {values[10]:.0f} %" for label, values in lines)
    return Chart(
        "evenness",
        "How evenly codewords are used",
        f"Line chart of the share of indices that the most used codewords take. {words}.",
        [charts.curves("evenness", lines, labels)],
        Table(
            "Share of the indices by most used codewords",
            ("codewords", *(label for label, _ in lines)),
            rows,
            words=0,
        ),
        note=f"Counted in up to 8 matrices of each kind.{chosen}",
    )
