"""The search for paths in Triton: what it finds, in Triton's interpreter, and what happens where it fails."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from pocketllm.codec.trellis import PathSearch, Trellis, differs

CPU = torch.device("cpu")

_COMPARED = """
import torch
from pocketllm.codec import trellis_gpu
from pocketllm.codec.trellis import PathSearch, Trellis
for width, stride, d in ((6, 2, 2), (7, 3, 1), (6, 6, 2), (8, 1, 4), (5, 4, 3)):
    generator = torch.Generator().manual_seed(width)
    lengths, aheads = [9, 20, 7, 20], [4, 0, 4, 2]
    points = torch.randn(sum(lengths) + sum(aheads), d, generator=generator)
    search = PathSearch(Trellis(width, stride), torch.device("cpu"))
    tables = search.ordered(torch.randn(3, 1 << width, d, generator=generator))
    which = torch.tensor([0, 1, 2, 0])
    ends = torch.tensor([0, 3, 5, 1]), torch.tensor([-1, -1, 4, -1])
    weights = points.square().sum(dim=1)
    arguments = points, weights, *tables, which, (which + 1).clamp(max=2), *ends, lengths, aheads
    assert torch.equal(trellis_gpu.search(*arguments, width, stride), search._torch(*arguments)), width
"""


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="no Triton; it comes with CUDA builds of torch"
)
def test_it_finds_what_torch_finds() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", _COMPARED], check=True, env=environment)


def test_another_search_is_tried_first() -> None:
    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("no such instruction")

    def as_torch(*arguments: Any) -> torch.Tensor:
        return PathSearch(Trellis(*arguments[-2:]), CPU)._torch(*arguments[:-2])

    assert differs(broken, CPU) == "no such instruction"
    assert differs(lambda *arguments: as_torch(*arguments) + 1, CPU) == "it finds other paths"
    assert differs(as_torch, CPU) == ""
