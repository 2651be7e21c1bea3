"""Rotation is orthogonal; error feedback lowers the proxy error and never ends above nearest codewords."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pocketllm.codec.codebook import Searcher, kmeans_codebook
from pocketllm.codec.feedback import assign
from pocketllm.codec.hessian import factorize
from pocketllm.codec.index_form import Independent
from pocketllm.codec.kernels import cpu, library, reference
from pocketllm.codec.kernels.reference import hartley
from pocketllm.codec.rotation import rotate, rotate_hessian, signs, unrotate
from pocketllm.errors import ConfigError


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 36, 52, 192, 576, 1009])
def test_rotation_is_orthogonal_and_undone(size: int) -> None:
    matrix = rotate(torch.eye(size), seed=9).double()
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-5)
    x = torch.randn(5, 3, size)
    assert torch.allclose(unrotate(rotate(x, 9), 9), x, atol=1e-5)
    assert torch.allclose(rotate(x, 9), (x.double() @ matrix).float(), atol=1e-5)


def test_hartley_is_orthogonal_and_symmetric() -> None:
    matrix = hartley(45).double()
    assert torch.allclose(matrix @ matrix, torch.eye(45, dtype=torch.float64), atol=1e-5)


def test_rotated_hessian_is_that_of_rotated_inputs() -> None:
    x = torch.randn(200, 36)
    expected = rotate(x, 4).T @ rotate(x, 4) / 200
    assert torch.allclose(rotate_hessian(x.T @ x / 200, 4), expected, atol=1e-4)


def test_rotation_spreads_an_outlier() -> None:
    x = torch.zeros(1, 576)
    x[0, 100] = 1.0
    assert float(rotate(x, 0).abs().max()) < 0.15


def test_signs_are_fixed_for_ever() -> None:
    """They are part of the stored form: these values must not change."""
    assert signs(12, 0).tolist() == signs(20, 0).tolist()[:12]
    assert abs(float(signs(10_000, 3).mean())) < 0.05
    assert not torch.equal(signs(64, 1), signs(64, 2))
    with pytest.raises(ConfigError, match="seed"):
        signs(4, -1)


def correlated(columns: int, tokens: int = 500) -> Tensor:
    x = torch.randn(tokens, columns) * torch.linspace(0.1, 3, columns) @ torch.randn(columns, columns)
    return x.T @ x / tokens


def proxy(weight: Tensor, indices: Tensor, scale: Tensor, table: Tensor, hessian: Tensor) -> Tensor:
    """[rows] of (w - s q) H (w - s q), in float64."""
    decoded = scale[:, None] * table[indices].reshape(weight.shape[0], -1)[:, : weight.shape[1]]
    error = (weight - decoded).double()
    return ((error @ hessian.double()) * error).sum(dim=1)


@pytest.mark.parametrize(("columns", "d"), [(64, 4), (30, 4), (260, 8), (5, 8)])
def test_feedback_beats_nearest_codewords_in_every_row(columns: int, d: int) -> None:
    weight, hessian = torch.randn(24, columns), correlated(columns)
    table = kmeans_codebook(torch.randn(4000, d), 64, 5, 0)
    factor = factorize(hessian, d)
    damped = factor.hessian[:columns, :columns]
    scale = weight.square().mean(dim=1).sqrt()
    padded = torch.nn.functional.pad(weight / scale[:, None], (0, -columns % d)).reshape(-1, d)
    plain = reference.nearest(padded, table).reshape(24, -1)
    before = proxy(weight, plain, scale, table, damped)
    after = proxy(weight, *assign(weight, factor, table, scale, Independent(64), passes=0), table, damped)
    better = proxy(weight, *assign(weight, factor, table, scale, Independent(64), passes=2), table, damped)
    assert (after <= before * 1.0001).all()
    assert (better <= after * 1.0001).all()
    if columns > d:
        assert float(better.sum()) < 0.5 * float(before.sum())


def test_without_correlation_the_nearest_codewords_are_chosen() -> None:
    weight = torch.randn(10, 32)
    table = kmeans_codebook(torch.randn(2000, 4), 32, 5, 0)
    factor = factorize(torch.eye(32), 4)
    indices, scale = assign(weight, factor, table, torch.ones(10), Independent(32), passes=0)
    assert torch.equal(indices, reference.nearest(weight.reshape(-1, 4), table).reshape(10, -1))
    unit = table[indices].reshape(10, -1)
    assert torch.allclose(scale, (weight * unit).sum(1) / (unit * unit).sum(1), rtol=1e-4)


@pytest.mark.parametrize("hessian", [torch.zeros(16, 16), torch.ones(16, 16)])
def test_degenerate_hessians(hessian: Tensor) -> None:
    table = kmeans_codebook(torch.randn(2000, 4), 32, 5, 0)
    indices, scale = assign(torch.randn(6, 16), factorize(hessian, 4), table, torch.ones(6), Independent(32))
    assert indices.shape == (6, 4) and torch.isfinite(scale).all()


def test_zero_rows_are_no_trouble() -> None:
    table = kmeans_codebook(torch.randn(2000, 4), 32, 5, 0)
    factor = factorize(correlated(16), 4)
    _, scale = assign(torch.zeros(3, 16), factor, table, torch.zeros(3), Independent(32))
    assert torch.equal(scale, torch.zeros(3))


@pytest.mark.parametrize(
    ("count", "size", "d"), [(1, 1, 1), (5, 7, 3), (1000, 300, 4), (333, 1000, 8), (50, 65, 16)]
)
def test_compiled_search_finds_what_torch_finds(count: int, size: int, d: int) -> None:
    if not cpu.searches_nearest(d):
        pytest.skip("no C++ compiler here")
    points, codebook = torch.randn(count, d), torch.randn(size, d)
    assert torch.equal(cpu.Table(codebook).nearest(points), reference.nearest(points, codebook))
    assert torch.equal(cpu.nearest_faiss(points, codebook), reference.nearest(points, codebook))


def test_compiled_search_gives_ties_to_the_lower_index() -> None:
    if not cpu.searches_nearest(3):
        pytest.skip("no C++ compiler here")
    points, codebook = torch.randint(-2, 3, (500, 3)).float(), torch.randint(-2, 3, (200, 3)).float()
    distances = (points[:, None] - codebook).square().sum(dim=2)
    lowest = torch.where(distances == distances.amin(1, keepdim=True), torch.arange(200), 200).amin(1)
    assert torch.equal(cpu.Table(codebook).nearest(points), lowest)
    assert torch.equal(reference.nearest(points, codebook), lowest)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETLLM_COMPILE", "0")
    library._loaded.cache_clear()
    try:
        assert not cpu.searches_nearest(4)
        points, codebook = torch.randn(50, 4), torch.randn(20, 4)
        assert torch.equal(Searcher(codebook).nearest(points), reference.nearest(points, codebook))
    finally:
        monkeypatch.undo()
        library._loaded.cache_clear()
