"""By how much paths lower the loss of rows that cost differently: predicted against reached by the codec."""

from __future__ import annotations

import pytest
import torch

from pocketllm.calibrate.row_gain import row_gain
from pocketllm.codec.feedback import assign
from pocketllm.codec.hashed_table import HashedTrellis
from pocketllm.codec.hessian import IdentityHessian


def test_equal_rows_gain_nothing() -> None:
    assert row_gain(torch.ones(300)) == pytest.approx(1.0)
    assert row_gain(torch.zeros(300)) == 1.0


@pytest.mark.parametrize("stride", [2, 3])
def test_gain_of_unequal_rows(stride: int) -> None:
    """Costs as of frequent and rare tokens; encoded at other bits than the prediction assumes."""
    generator = torch.Generator().manual_seed(0)
    costs = (1 - torch.rand(768, generator=generator)).reciprocal().clamp(max=300)
    weight, form = torch.randn(768, 24, generator=generator), HashedTrellis(12, stride)
    table = form.table(form.fit_codebook(torch.randn(1 << 14, 1, generator=generator), 3, 0).table)
    factor, scale = IdentityHessian(24, weight.device).factor(None, 1), torch.ones(768)

    def loss(importance: torch.Tensor | None) -> float:
        indices, sizes = assign(weight, factor, table, scale, form, row_importance=importance)
        error = weight - sizes[:, None] * table[indices].reshape(weight.shape)
        return float(error.square().sum(dim=1) @ costs)

    reached = loss(costs / costs.mean()) / loss(None)
    assert reached < 0.7
    assert row_gain(costs) == pytest.approx(reached, rel=0.2)
