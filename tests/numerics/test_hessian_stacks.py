"""Hessians that are factorized in one call have the factors that they have one by one."""

from __future__ import annotations

import pytest
import torch

from pocketllm.codec import hessian as module
from pocketllm.codec.hessian import Hessian
from pocketllm.errors import WeightError


def some(count: int, columns: int, damping: float = 0.01) -> list[Hessian]:
    """Hessians of fewer inputs than columns; the last is zero but for one number, and needs more damping."""
    inputs = torch.randn(count, columns // 2, columns)
    matrices = list(inputs.mT @ inputs)
    matrices[-1] = -1e-2 * torch.eye(columns)
    matrices[-1][0, 0] = 1.0
    return [Hessian(matrix, damping) for matrix in matrices]


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_stacks(seed: int | None, at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    hessians = [*some(3, 10), *some(2, 12), *some(2, 10, damping=0.3)]
    wanted = [Hessian(h.matrix, h.damping).factor(seed, 4) for h in hessians]
    monkeypatch.setattr(module, "STACKED_NUMBERS", at_once * 12**2)
    Hessian.factorize_together(hessians, seed, 4)
    monkeypatch.setattr(module, "factorize", None)  # all are there
    for hessian, one in zip(hessians, wanted, strict=True):
        found = hessian.factor(seed, 4)
        assert torch.equal(found.hessian, one.hessian)
        assert torch.equal(found.upper, one.upper)
        assert found.columns == one.columns


def test_a_stack_with_nan() -> None:
    hessians = some(3, 8)
    hessians[1].matrix[2, 2] = torch.nan
    with pytest.raises(WeightError, match="NaN or Inf"):
        Hessian.factorize_together(hessians, None, 2)
