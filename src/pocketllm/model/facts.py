"""What a run finds out about each matrix: errors, use of codebooks; and what stands for it before the run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from pocketllm.codec import codebook as cb
from pocketllm.model.plan import Matrix, Plan
from pocketllm.model.report import MatrixReport, rounded
from pocketllm.model.units import codebook_unit, matrix_unit
from pocketllm.model.workspace import Workspace

_WIDEST = 1.23457e-05  # no number that is `rounded` is longer in JSON
_WIDEST_COUNT = 10**9


@dataclass(frozen=True)
class Measured:
    """What only a real run knows, by matrix; `fits` by codebook."""

    nmse: Mapping[str, float]
    proxy_error: Mapping[str, float | None]
    utilization: Mapping[str, float]
    perplexity: Mapping[str, float]
    input_tokens: Mapping[str, int | None]
    unseen_experts: Mapping[str, int | None]
    fits: tuple[dict[str, Any], ...]


def predicted(plan: Plan) -> Measured:
    """Stands for what a dry run does not know, as wide as the real numbers can get."""
    names = [m.name for m in plan.matrices]
    fits = tuple(_widest_fit(plan, key, group) for key, group in plan.groups().items())
    widest, counts = dict.fromkeys(names, _WIDEST), dict.fromkeys(names, _WIDEST_COUNT)
    return Measured(widest, widest, widest, widest, counts, counts, fits)


def _widest_fit(plan: Plan, key: str, group: list[Matrix]) -> dict[str, Any]:
    by_decoder = {plan.decoder_key(m): _WIDEST for m in group}
    on_trellis = plan.config.codec.trellis_width is not None
    points = max(1, plan.config.codec.kmeans_iterations) if on_trellis else plan.config.codec.epochs
    return {
        "codebook": key,
        "start_nmse": by_decoder,
        "final_nmse": by_decoder,
        "sample_utilization": _WIDEST,
        "curve": [_WIDEST] * points,
        "revived": _WIDEST_COUNT,
    }


def not_run(plan: Plan) -> Measured:
    """Of a run that has not happened: errors are predictions, the rest is unknown."""
    nmse = {m.name: rounded(plan.specs[m.name].nmse) for m in plan.matrices}
    unknown, nan = dict.fromkeys(nmse), dict.fromkeys(nmse, math.nan)
    return Measured(nmse, unknown, nan, nan, unknown, unknown, ())


def measured(plan: Plan, work: Workspace) -> Measured:
    """What a finished run found."""
    nmse, proxy, use, perplexity, tokens, unseen, fits = {}, {}, {}, {}, {}, {}, []
    for number, group in enumerate(plan.groups().values()):
        fits.append(_rounded_tree(work.load(codebook_unit(number))[1]))
        units = [work.load(matrix_unit(plan, m)) for m in group]
        counts = torch.stack([tensors["counts"].long() for tensors, _ in units]).sum(dim=0)
        for matrix, (_, facts) in zip(group, units, strict=True):
            nmse[matrix.name] = rounded(facts["nmse"])
            proxy[matrix.name] = rounded(facts["proxy_error"]) if "proxy_error" in facts else None
            tokens[matrix.name] = facts.get("input_tokens")
            unseen[matrix.name] = facts.get("unseen_experts")
            use[matrix.name] = rounded(cb.codebook_utilization(counts))
            perplexity[matrix.name] = rounded(cb.codebook_perplexity(counts))
    return Measured(nmse, proxy, use, perplexity, tokens, unseen, tuple(fits))


def matrix_report(plan: Plan, matrix: Matrix, bits: float, measured: Measured) -> MatrixReport:
    """bits: of the matrix with its share of codebook and decoder."""
    spec = plan.specs[matrix.name]
    return MatrixReport(
        matrix.name,
        matrix.kind,
        matrix.shape,
        rounded(bits / matrix.weights),
        measured.nmse[matrix.name],
        measured.proxy_error[matrix.name],
        measured.utilization[matrix.name],
        measured.perplexity[matrix.name],
        spec.vector_len,
        spec.codebook_size,
        spec.stride or None,
        matrix.columns,
        measured.input_tokens[matrix.name],
        measured.unseen_experts[matrix.name],
    )


def _rounded_tree(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded_tree(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded_tree(item) for item in value]
    return rounded(value) if isinstance(value, float) else value
