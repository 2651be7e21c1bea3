"""The bounds and the scalar quantizer against closed forms and published figures."""

from __future__ import annotations

import pytest
import torch

from pocketllm.studies.measure.rates import bits_for_mse, gaussian_mse, lloyd_max


@pytest.mark.parametrize("bits", [0.5, 1.0, 2.0, 8.0])
def test_rows_alike_are_one_gaussian_source(bits: float) -> None:
    assert gaussian_mse(torch.full((7,), 3.0), bits) == pytest.approx(3.0 * 4**-bits)


def test_two_rows_against_the_closed_form() -> None:
    """At a high rate both rows get bits, and the error is the geometric mean; at a low one only the louder."""
    squares = torch.tensor([16.0, 1.0])
    assert gaussian_mse(squares, 3.0) == pytest.approx((16.0 * 1.0) ** 0.5 * 4**-3)
    level = 16.0 * 4 ** (-2 * 0.5)  # half a bit per weight is one for the louder row
    assert gaussian_mse(squares, 0.5) == pytest.approx((level + 1.0) / 2)


@pytest.mark.parametrize("mse", [1e-8, 1e-3, 0.3, 0.9])
def test_bits_are_the_inverse(mse: float) -> None:
    squares = torch.rand(50, generator=torch.Generator().manual_seed(0)) + 0.5
    assert gaussian_mse(squares, bits_for_mse(squares, mse)) == pytest.approx(min(mse, float(squares.mean())))


def test_zeros_need_no_bits() -> None:
    assert bits_for_mse(torch.tensor([1.0, 3.0]), 2.0) == 0.0


@pytest.mark.parametrize(("size", "published"), [(2, 0.3634), (4, 0.1175), (16, 0.009497)])
def test_scalar_quantizer_of_a_gaussian(size: int, published: float) -> None:
    """Max, "Quantizing for Minimum Distortion" (1960), table I."""
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(0))
    levels = lloyd_max(values, size, 100)[:, 0]
    found = levels[torch.bucketize(values, (levels[1:] + levels[:-1]) / 2)]
    assert float((values - found).square().mean()) == pytest.approx(published, rel=0.02)
