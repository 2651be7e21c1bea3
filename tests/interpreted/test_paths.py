"""The search for paths in Triton finds what torch finds."""

from __future__ import annotations

import pytest
import torch

from pocketllm.codec.kernels import reference, triton
from pocketllm.codec.kernels.reference import PathProblem


@pytest.mark.parametrize(("width", "stride", "d"), [(6, 2, 2), (7, 3, 1), (6, 6, 2), (8, 1, 4), (5, 4, 3)])
def test_it_finds_what_torch_finds(width: int, stride: int, d: int) -> None:
    generator = torch.Generator().manual_seed(width)
    lengths, lookahead = [9, 20, 7, 20], [4, 0, 4, 2]
    points = torch.randn(sum(lengths) + sum(lookahead), d, generator=generator)
    tables = torch.randn(3, d, 1 << width, generator=generator)
    which = torch.tensor([0, 1, 2, 0])
    problem = PathProblem(
        points=points,
        weights=points.square().sum(dim=1),
        tables=tables,
        halves=tables.square().sum(dim=1) / 2,
        which=which,
        after=(which + 1).clamp(max=2),
        start=torch.tensor([0, 3, 5, 1]),
        stop=torch.tensor([-1, -1, 4, -1]),
        lengths=lengths,
        lookahead=lookahead,
        width=width,
        stride=stride,
    )
    assert torch.equal(triton.cheapest_paths(problem), reference.cheapest_paths(problem))
