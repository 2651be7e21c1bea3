"""Codebook: exact nearest codewords (lower index on ties), centroids, use statistics, straight-through."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pocketllm.codec.codebook import (
    centroids,
    codebook_perplexity,
    codebook_utilization,
    kmeans_codebook,
    nearest,
    normal_codebook,
    straight_through,
)
from pocketllm.codec.kernels import reference

SIZES = [(1, 1, 1), (3, 4, 2), (19, 7, 3), (21, 64, 4), (500, 300, 6), (1000, 1024, 8), (64, 50, 33)]


def squared_distances(points: Tensor, codebook: Tensor) -> Tensor:
    """[N, K] in float64, by the definition."""
    return (points.double()[:, None] - codebook.double()[None]).square().sum(dim=2)


def first_least(distances: Tensor) -> Tensor:
    """Lowest index among the least of each row."""
    return (distances == distances.amin(dim=1, keepdim=True)).to(torch.uint8).argmax(dim=1)


@pytest.mark.parametrize("search", [nearest, reference.nearest])
@pytest.mark.parametrize(("count", "size", "d"), SIZES)
def test_nearest_on_random_data(
    search: Callable[[Tensor, Tensor], Tensor], count: int, size: int, d: int
) -> None:
    """Equal to float64 brute force wherever the two best differ by more than float32 can blur."""
    points, codebook = torch.randn(count, d), torch.randn(size, d)
    found, distances = search(points, codebook), squared_distances(points, codebook)
    assert found.dtype == torch.int64
    assert found.shape == (count,)
    excess = distances.gather(1, found[:, None])[:, 0] - distances.amin(dim=1)
    assert excess.max() <= 1e-4
    two_best = distances.topk(min(2, size), largest=False).values
    clear = (two_best[:, -1] - two_best[:, 0] > 1e-4) | (size == 1)
    assert clear.float().mean() > 0.99
    assert torch.equal(found[clear], first_least(distances)[clear])


@pytest.mark.parametrize("grid", [1, 2, 5])
@pytest.mark.parametrize(("count", "size", "d"), SIZES)
def test_ties_go_to_the_lower_index(grid: int, count: int, size: int, d: int) -> None:
    """Small integers: every distance is exact in float32, so most points have several nearest codewords."""
    points = torch.randint(-grid, grid + 1, (count, d)).float()
    codebook = torch.randint(-grid, grid + 1, (size, d)).float()
    expected = first_least(squared_distances(points, codebook))
    assert torch.equal(nearest(points, codebook), expected)
    assert torch.equal(reference.nearest(points, codebook), expected)


@pytest.mark.parametrize("search", [nearest, reference.nearest])
def test_of_duplicated_codewords_the_first_wins(search: Callable[[Tensor, Tensor], Tensor]) -> None:
    codebook = torch.randn(37, 4).repeat(3, 1)
    found = search(codebook.clone(), codebook)
    assert torch.equal(found, torch.arange(37).repeat(3))


def test_nearest_takes_bfloat16_strided_and_empty_points() -> None:
    codebook = torch.randn(16, 4)
    points = torch.randn(4, 40).bfloat16().T
    assert torch.equal(nearest(points, codebook), reference.nearest(points.float().contiguous(), codebook))
    assert nearest(torch.empty(0, 4), codebook).shape == (0,)
    assert reference.nearest(torch.empty(0, 4), codebook).shape == (0,)


def test_centroids_are_means_and_leave_unused_codewords() -> None:
    points = torch.tensor([[0.0, 2.0], [2.0, 4.0], [5.0, 5.0]])
    codebook = torch.tensor([[9.0, 9.0], [7.0, 7.0], [1.0, 1.0]])
    moved = centroids(points, torch.tensor([2, 2, 0]), codebook)
    assert moved.tolist() == [[5.0, 5.0], [7.0, 7.0], [1.0, 3.0]]
    assert moved.dtype == codebook.dtype


def test_centroids_against_a_loop() -> None:
    points, codebook = torch.randn(200, 3), torch.randn(11, 3)
    indices = nearest(points, codebook)
    moved = centroids(points, indices, codebook)
    for k in range(11):
        mine = points[indices == k]
        torch.testing.assert_close(moved[k], mine.mean(dim=0) if len(mine) else codebook[k])


def test_kmeans_is_reproducible_and_follows_its_seed() -> None:
    points = torch.randn(2000, 4)
    first = kmeans_codebook(points, 32, 5, seed=3)
    assert first.shape == (32, 4)
    assert torch.equal(first, kmeans_codebook(points, 32, 5, seed=3))
    assert not torch.equal(first, kmeans_codebook(points, 32, 5, seed=4))


def test_kmeans_finds_separated_clusters() -> None:
    centres = 10 * torch.eye(4)
    points = centres.repeat(50, 1) + 0.01 * torch.randn(200, 4)
    found = kmeans_codebook(points, 4, 25, seed=0)
    assert torch.equal(nearest(centres, found).sort().values, torch.arange(4))


def test_more_rounds_of_kmeans_never_hurt() -> None:
    points = torch.randn(4000, 4)
    errors = []
    for rounds in (1, 3, 10, 20):
        codebook = kmeans_codebook(points, 64, rounds, seed=0)
        errors.append(float((points - codebook[nearest(points, codebook)]).square().sum()))
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("d", [2, 4, 8])
def test_normal_codebook_has_the_published_deviation(d: int) -> None:
    """2^18 draws: the standard error of the deviation is 0.14 %, the bound about five of them."""
    codebook = normal_codebook((1 << 18) // d, d, torch.Generator().manual_seed(0))
    assert codebook.shape == ((1 << 18) // d, d)
    assert codebook.std().item() == pytest.approx(2 / math.sqrt(d), rel=0.007)
    assert abs(codebook.mean().item()) < 0.01
    assert torch.equal(codebook, normal_codebook((1 << 18) // d, d, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("counts", "share", "effective"),
    [
        ([5, 5, 5, 5], 1.0, 4.0),
        ([7, 0, 0, 0], 0.25, 1.0),
        ([3, 3, 0, 0], 0.5, 2.0),
        ([2, 1, 1, 0], 0.75, 2**1.5),
    ],
)
def test_use_statistics(counts: list[int], share: float, effective: float) -> None:
    assert codebook_utilization(torch.tensor(counts)) == share
    assert codebook_perplexity(torch.tensor(counts)) == pytest.approx(effective, rel=1e-12)


def test_straight_through_has_the_value_of_q_and_the_gradient_of_z() -> None:
    z = torch.randn(5, 4, requires_grad=True)
    q = torch.randn(5, 4, requires_grad=True)
    out = straight_through(z, q)
    torch.testing.assert_close(out, q)
    upstream = torch.randn(5, 4)
    out.backward(upstream)
    assert z.grad is not None
    assert torch.equal(z.grad, upstream)
    assert q.grad is None
