"""How the codewords of each codebook are used, counted in the stored indices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pocketllm.model import Matrices
from pocketllm.report.model_facts import ModelFacts, grouped, spread

STEPS = 101


@dataclass(frozen=True)
class CodebookUsage:
    """Use of one codebook by the matrices whose indices were counted.

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
        found = torch.bincount(matrices.indices(matrix.name).flatten(), minlength=size)
        counts[matrix.codebook] = counts.get(matrix.codebook, 0) + found
    return [
        CodebookUsage(codebook=key, covered=_covered(count), used=float((count > 0).double().mean()))
        for key, count in counts.items()
    ]


def _covered(counts: Tensor) -> list[float]:
    """counts: int64 [K]. Returns: 101 shares, linearly interpolated between the codewords."""
    total = counts.sort(descending=True).values.double().cumsum(0) / counts.sum()
    points = torch.cat([torch.zeros(1, dtype=torch.float64), total])
    place = torch.linspace(0, len(counts), STEPS, dtype=torch.float64)
    low = place.floor().long().clamp(max=len(counts) - 1)
    part = place - low
    return (points[low] * (1 - part) + points[low + 1] * part).tolist()
