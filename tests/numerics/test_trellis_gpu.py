"""The search for paths in Triton: what it finds, in Triton's interpreter, and what happens where it fails."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from pocketllm.codec.kernels import reference, select
from pocketllm.codec.kernels.reference import PathProblem

CPU = torch.device("cpu")

_COMPARED = """
import torch
from pocketllm.codec.kernels import reference, triton
from pocketllm.codec.kernels.reference import PathProblem
for width, stride, d in ((6, 2, 2), (7, 3, 1), (6, 6, 2), (8, 1, 4), (5, 4, 3)):
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
    assert torch.equal(triton.cheapest_paths(problem), reference.cheapest_paths(problem)), width
"""


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="no Triton; it comes with CUDA builds of torch"
)
def test_it_finds_what_torch_finds() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", _COMPARED], check=True, env=environment)


def test_another_search_is_tried_first(caplog: pytest.LogCaptureFixture) -> None:
    def broken(problem: PathProblem) -> torch.Tensor:
        raise RuntimeError("no such instruction")

    assert not select._agrees("Triton", partial(select.paths_differ, broken), CPU)
    assert "the Triton kernel is not used on cpu (no such instruction)" in caplog.text
    assert (
        select.paths_differ(lambda p: reference.cheapest_paths(p) + 1, CPU) == "its paths differ from torch's"
    )
    assert select.paths_differ(reference.cheapest_paths, CPU) == ""
