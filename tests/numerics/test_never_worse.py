"""Whatever the weights, the Hessian and the shape: never a higher proxy error than nearest codewords."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import Tensor

from pocketllm.codec.codebook import nearest_torch, seeded_codebook
from pocketllm.codec.feedback import HessianFactor, assign, factorize
from pocketllm.codec.trellis import Trellis, strip_lengths
from tests.numerics.test_calibrated import proxy


@st.composite
def problems(draw: st.DrawFn) -> tuple[Tensor, Tensor, int]:
    """(weight [rows, columns], Hessian, d): heavy tails, outliers, zero rows; few tokens, dead or loud inputs."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    rows, columns = draw(st.integers(1, 40)), draw(st.integers(1, 45))
    d, tokens = draw(st.integers(1, 5)), draw(st.sampled_from([1, 3, 20, 400]))
    weight = torch.randn(rows, columns, generator=generator)
    kind = draw(st.sampled_from(["normal", "heavy", "outlier", "zero rows", "alike"]))
    if kind == "heavy":
        weight = weight**3
    elif kind == "outlier":
        weight[0, columns // 2] = 100.0
    elif kind == "zero rows":
        weight[::3] = 0
    elif kind == "alike":
        weight = torch.full_like(weight, 0.3)
    x = torch.randn(tokens, columns, generator=generator)
    x = x * 10.0 ** torch.linspace(-2, draw(st.sampled_from([-2.0, 0.0, 2.0])), columns)
    if draw(st.booleans()):
        x = x @ torch.randn(columns, columns, generator=generator)
    if draw(st.booleans()):
        x[:, : columns // 3] = 0
    return weight, x.T @ x / tokens, d


def nearest(weight: Tensor, table: Tensor, scale: Tensor, trellis: Trellis | None) -> tuple[Tensor, Tensor]:
    """Nearest codewords, or the nearest path: what error feedback finds where inputs are all alike."""
    d = table.shape[1]
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % d))
    return assign(padded, factorize(torch.eye(padded.shape[1]), d), table, scale, 0, trellis)


def losses(
    weight: Tensor, found: tuple[Tensor, Tensor], table: Tensor, factor: HessianFactor, strips: list[int]
) -> Tensor:
    """Summed over the rows of each strip."""
    columns = weight.shape[1]
    loss = proxy(weight, *found, table, factor.hessian[:columns, :columns])
    return torch.stack([part.sum() for part in loss.split(strips)])


def below(one: Tensor, other: Tensor, weight: Tensor, factor: HessianFactor) -> bool:
    """one <= other, but for float32 rounding on the scale of the whole."""
    energy = float(weight.double().square().sum()) * float(factor.hessian.double().diagonal().max())
    return bool((one <= other * (1 + 1e-4) + 1e-6 * energy).all())


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(0, 2))
def test_independent_indices(problem: tuple[Tensor, Tensor, int], passes: int) -> None:
    weight, hessian, d = problem
    table, factor = seeded_codebook(32, d, 3).float(), factorize(hessian, d)
    rows, columns = weight.shape
    scale = weight.square().mean(dim=1).sqrt().clamp(min=1e-12)
    padded = torch.nn.functional.pad(weight / scale[:, None], (0, -columns % d)).reshape(-1, d)
    plain = nearest_torch(padded, table).reshape(rows, -1), scale
    found = assign(weight, factor, table, scale, passes)
    strips = [1] * rows
    one, other = (losses(weight, each, table, factor, strips) for each in (found, plain))
    assert below(one, other, weight, factor)


@settings(max_examples=40, deadline=None)
@given(problems(), st.integers(0, 2), st.sampled_from([(4, 2), (5, 1), (4, 4)]))
def test_indices_on_a_trellis(
    problem: tuple[Tensor, Tensor, int], passes: int, sizes: tuple[int, int]
) -> None:
    weight, hessian, d = problem
    trellis, factor = Trellis(*sizes), factorize(hessian, d)
    table = seeded_codebook(1 << trellis.width, d, 3).float()
    scale = weight.square().mean(dim=1).sqrt().clamp(min=1e-12)
    plain = nearest(weight, table, scale, trellis)
    found = assign(weight, factor, table, scale, passes, trellis)
    strips = strip_lengths(len(weight), trellis.strip_rows)
    one, other = (losses(weight, each, table, factor, strips) for each in (found, plain))
    assert below(one, other, weight, factor)


@pytest.mark.parametrize("trellis", [None, Trellis(6, 3)])
def test_a_tall_matrix_of_many_strips(trellis: Trellis | None) -> None:
    weight = torch.randn(700, 50) * torch.linspace(0.1, 3, 700)[:, None]
    x = torch.randn(400, 50) @ torch.randn(50, 50)
    table, factor = seeded_codebook(64, 3, 3).float(), factorize(x.T @ x / 400, 3)
    scale = weight.square().mean(dim=1).sqrt()
    plain = nearest(weight, table, scale, trellis)
    found = assign(weight, factor, table, scale, 0, trellis)
    strips = strip_lengths(700, 256) if trellis else [1] * 700
    one, other = (losses(weight, each, table, factor, strips) for each in (found, plain))
    assert below(one, other, weight, factor) and float(one.sum()) < 0.8 * float(other.sum())
