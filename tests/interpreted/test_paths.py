"""The search for paths in Triton finds what torch finds, for one problem and for several in one launch."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from pocketllm.codec.kernels import reference, triton
from pocketllm.codec.kernels.reference import PathProblem


def problem(width: int, stride: int, d: int, lengths: list[int], lookahead: list[int]) -> PathProblem:
    generator = torch.Generator().manual_seed(width + len(lengths))
    points = torch.randn(sum(lengths) + sum(lookahead), d, generator=generator)
    tables = torch.randn(3, d, 1 << width, generator=generator)
    which = torch.arange(len(lengths)) % 3
    return PathProblem(
        points=points,
        weights=points.square().sum(dim=1),
        tables=tables,
        halves=tables.square().sum(dim=1) / 2,
        which=which,
        after=(which + 1).clamp(max=2),
        start=torch.tensor([0, 3, 5, 1])[: len(lengths)],
        stop=torch.tensor([-1, -1, 4, -1])[: len(lengths)],
        lengths=lengths,
        lookahead=lookahead,
        width=width,
        stride=stride,
    )


@pytest.mark.parametrize(("width", "stride", "d"), [(6, 2, 2), (7, 3, 1), (6, 6, 2), (8, 1, 4), (5, 4, 3)])
def test_it_finds_what_torch_finds(width: int, stride: int, d: int) -> None:
    one = problem(width, stride, d, [9, 20, 7, 20], [4, 0, 4, 2])
    assert torch.equal(triton.cheapest_paths(one), reference.cheapest_paths(one))


def test_several_problems_at_once() -> None:
    """Matrices of different shapes, with arrays that begin anywhere, give the same paths as one by one."""
    some = [
        problem(6, 2, 2, [9, 20, 7], [4, 0, 4]),
        problem(7, 3, 1, [11], [0]),
        problem(6, 2, 2, [5, 13], [0, 3]),
        problem(6, 2, 2, [3], [2]),
    ]
    weights = torch.cat([torch.zeros(1), some[2].weights])[1:]
    some[2] = dataclasses.replace(some[2], weights=weights)
    found = triton.cheapest_paths_of(some)
    for one, paths in zip(some, found, strict=True):
        assert torch.equal(paths, reference.cheapest_paths(one))
        assert torch.equal(paths, triton.cheapest_paths(one))
