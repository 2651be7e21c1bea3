"""Statistics of each matrix: errors and codebook usage, and placeholders for them before the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pocketllm.format.report import MatrixReport, rounded
from pocketllm.plan.matrices import Matrix, Plan

_WIDEST = 1.23457e-05  # no `rounded` number is longer in JSON
_WIDEST_COUNT = 10**9


@dataclass(frozen=True)
class MatrixStatistics:
    """Values that only a run can measure, by matrix; `fits` by codebook."""

    nmse: Mapping[str, float]
    proxy_error: Mapping[str, float | None]
    utilization: Mapping[str, float]
    perplexity: Mapping[str, float]
    input_tokens: Mapping[str, int | None]
    unseen_experts: Mapping[str, int | None]
    fits: tuple[dict[str, Any], ...]


def predicted(plan: Plan) -> MatrixStatistics:
    """Placeholders for values that a dry run does not know, as wide as the real numbers can be."""
    names = [m.name for m in plan.matrices]
    fits = tuple(_widest_fit(plan, key, group) for key, group in plan.groups().items())
    widest, counts = dict.fromkeys(names, _WIDEST), dict.fromkeys(names, _WIDEST_COUNT)
    return MatrixStatistics(widest, widest, widest, widest, counts, counts, fits)


def _widest_fit(plan: Plan, key: str, group: list[Matrix]) -> dict[str, Any]:
    by_decoder = {plan.decoder_key(m): _WIDEST for m in group}
    form = plan.specs[group[0].name].form
    return {
        "codebook": key,
        "start_nmse": by_decoder,
        "final_nmse": by_decoder,
        "sample_utilization": _WIDEST,
        "curve": [_WIDEST] * form.fit_errors(plan.config.codec),
        "revived": _WIDEST_COUNT,
    }


def not_run(plan: Plan) -> MatrixStatistics:
    """Statistics of a run that has not happened: errors are predictions, the rest is unknown."""
    nmse = {m.name: rounded(plan.specs[m.name].nmse) for m in plan.matrices}
    unknown, nan = dict.fromkeys(nmse), dict.fromkeys(nmse, math.nan)
    return MatrixStatistics(nmse, unknown, nan, nan, unknown, unknown, ())


def matrix_report(plan: Plan, matrix: Matrix, bits: float, measured: MatrixStatistics) -> MatrixReport:
    """bits: of the matrix with its share of codebook and decoder."""
    spec = plan.specs[matrix.name]
    return MatrixReport(
        name=matrix.name,
        kind=matrix.kind,
        shape=matrix.shape,
        bpw=rounded(bits / matrix.weights),
        nmse=measured.nmse[matrix.name],
        proxy_error=measured.proxy_error[matrix.name],
        codebook_utilization=measured.utilization[matrix.name],
        codebook_perplexity=measured.perplexity[matrix.name],
        vector_len=spec.vector_len,
        codebook_size=spec.codebook_size,
        stride=spec.stride or None,
        columns=matrix.columns,
        input_tokens=measured.input_tokens[matrix.name],
        unseen_experts=measured.unseen_experts[matrix.name],
    )
