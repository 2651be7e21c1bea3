"""Where the nearest path is not searched, it would have been worse than error feedback."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pocketllm.codec import feedback
from pocketllm.codec.hashed_table import HashedTrellis
from pocketllm.codec.hessian import HessianFactor, factorize
from pocketllm.codec.normalization import row_rms

FORM = HashedTrellis(9, 4, strip_rows=24)


def correlated(size: int, decades: float, damping: float) -> HessianFactor:
    """A Hessian of inputs with correlations, their variances spread over some decades."""
    spread = 10 ** torch.linspace(0, -decades / 2, size)
    x = torch.randn(4 * size, size) * spread @ torch.linalg.qr(torch.randn(size, size)).Q
    return factorize(x.T @ x / len(x), 2, damping)


def table() -> Tensor:
    points = torch.randn(1 << 12, 2)
    return FORM.table(FORM.fit_codebook(points, 3, 0).table)


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Losses of error feedback and of the nearest path, where the latter was searched or would have been."""
    found: list[Tensor] = []
    original = feedback._Problem.is_far_below_nearest

    def look(self: Any, loss: Tensor, nmse: float) -> bool:
        skips = original(self, loss, nmse)
        nearest = self.scored(self.nearest(row_rms(self.weight)))[2]
        found.append(torch.stack([torch.tensor(float(skips)), loss.sum(), nearest.sum()]))
        return skips

    monkeypatch.setattr(feedback._Problem, "is_far_below_nearest", look)
    return found


@pytest.mark.parametrize("two_sided", [False, True])
@pytest.mark.parametrize("decades", [0.0, 1.0, 3.0, 6.0])
def test_what_is_left_out_is_worse(decades: float, two_sided: bool, searched: list[Tensor]) -> None:
    weight, codewords = torch.randn(72, 192), table()
    weight *= 0.5 + torch.rand(72, 1)
    for _ in range(2):
        outputs = correlated(72, decades / 2, 0.3) if two_sided else None
        feedback.assign(
            weight, correlated(192, decades, 0.01), codewords, row_rms(weight), FORM, outputs=outputs
        )
    skipped = [found for found in searched if found[0]]
    assert len(searched) == 2 and len(skipped) == (2 if decades or two_sided else 0)
    assert all(float(nearest) > 1.1 * float(loss) for _, loss, nearest in skipped)


@pytest.mark.parametrize("kind", ["peaked", "flat", "loud input", "few"])
def test_where_the_estimate_does_not_hold_it_is_searched(kind: str, searched: list[Tensor]) -> None:
    weight, factor = torch.randn(4 if kind == "few" else 72, 192), correlated(192, 6.0, 0.01)
    if kind == "peaked":
        weight = weight**3
    elif kind == "flat":
        weight = weight.sign()
    elif kind == "loud input":
        loud = torch.ones(192)
        loud[5] = 30
        factor = factorize(loud[:, None] * factor.hessian * loud, 2)
    feedback.assign(weight, factor, table(), row_rms(weight), FORM)
    assert [bool(found[0]) for found in searched] == [False]
