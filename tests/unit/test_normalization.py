"""RLN takes its statistics over the full row; row scales are exact, least-squares, and safe on zero rows."""

from __future__ import annotations

import pytest
import torch

from pocketllm.codec.normalization import (
    EPS,
    NORMS,
    best_row_scale,
    divide_rows,
    reshaped_layer_norm,
    row_rms,
    subvector_layer_norm,
)
from pocketllm.codec.subvectors import cut, join

SHAPES = [(1, 1, 1), (1, 1, 8), (5, 3, 4), (2, 96, 6), (7, 72, 8)]


@pytest.mark.parametrize("shape", SHAPES)
def test_rln_is_a_layer_norm_over_the_joined_row(shape: tuple[int, int, int]) -> None:
    x = 3.0 * torch.randn(shape) + 0.7
    row = join(x, shape[1] * shape[2]).double()
    mean = row.mean(dim=1, keepdim=True)
    expected = (row - mean) / (row.var(dim=1, keepdim=True, unbiased=False) + EPS).sqrt()
    torch.testing.assert_close(
        join(reshaped_layer_norm(x), row.shape[1]).double(), expected, rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(
        torch.nn.functional.layer_norm(row, row.shape[1:], eps=EPS), expected, rtol=1e-12, atol=1e-12
    )


def test_rln_differs_from_the_ablation() -> None:
    x = torch.randn(4, 8, 4)
    assert (reshaped_layer_norm(x) - subvector_layer_norm(x)).abs().max() > 0.1


@pytest.mark.parametrize("shape", SHAPES)
def test_the_ablation_is_a_layer_norm_over_the_subvector(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape)
    assert torch.equal(subvector_layer_norm(x), torch.nn.functional.layer_norm(x, [shape[2]], eps=EPS))


def test_rows_do_not_see_each_other() -> None:
    x = torch.randn(3, 8, 4)
    changed = x.clone()
    changed[1] += torch.randn(8, 4)
    same = (reshaped_layer_norm(x) == reshaped_layer_norm(changed)).all(dim=(1, 2))
    assert same.tolist() == [True, False, True]


def test_constant_rows_normalize_to_zero() -> None:
    assert not reshaped_layer_norm(torch.full((2, 4, 4), 1.5)).any()


def test_no_norm_is_the_identity() -> None:
    x = torch.randn(2, 3, 4)
    assert NORMS["none"](x) is x


def test_row_rms_against_float64() -> None:
    weight = torch.randn(6, 33).bfloat16()
    expected = weight.double().square().mean(dim=1).sqrt().float()
    assert row_rms(weight).dtype == torch.float32
    torch.testing.assert_close(row_rms(weight), expected)


def test_divide_rows_leaves_zero_rows_at_zero() -> None:
    weight = torch.randn(3, 8)
    weight[1] = 0
    unit = divide_rows(weight, row_rms(weight))
    assert unit.isfinite().all()
    assert not unit[1].any()
    torch.testing.assert_close(row_rms(unit), torch.tensor([1.0, 0.0, 1.0]))


def test_divide_rows_by_a_zero_scale_is_zero() -> None:
    assert not divide_rows(torch.ones(2, 4), torch.zeros(2)).any()


def test_best_row_scale_is_the_least_squares_optimum() -> None:
    weight, unit = torch.randn(16, 40), torch.randn(16, 40)
    scale = best_row_scale(weight, unit).double()

    def error(s: torch.Tensor) -> torch.Tensor:
        return (weight.double() - s[:, None] * unit.double()).square().sum(dim=1)

    expected = torch.stack(
        [torch.linalg.lstsq(u[:, None], w[:, None]).solution[0, 0] for w, u in zip(weight, unit, strict=True)]
    )
    torch.testing.assert_close(scale.float(), expected, rtol=1e-4, atol=1e-6)
    for step in (1e-3, 0.1, 1.0):
        assert (error(scale) < error(scale + step)).all()
        assert (error(scale) < error(scale - step)).all()


def test_best_row_scale_of_zero_rows_is_zero() -> None:
    weight, unit = torch.randn(3, 8), torch.randn(3, 8)
    weight[0] = 0
    unit[1] = 0
    scale = best_row_scale(weight, unit)
    assert scale[0] == 0
    assert scale[1] == 0
    assert scale[2] != 0


def test_cut_then_rln_counts_the_padding() -> None:
    """A ragged row is normalized with its padding, as the encoder sees it."""
    weight = torch.randn(2, 5).double()
    padded = torch.nn.functional.pad(weight, (0, 3))
    expected = torch.nn.functional.layer_norm(padded, [8], eps=EPS)
    torch.testing.assert_close(reshaped_layer_norm(cut(weight, 4)).reshape(2, 8), expected)
