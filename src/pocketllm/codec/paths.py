"""Cheapest paths through a bitshift trellis: what is asked, and who answers it.

On a CPU that is `trellis.cpp`, on a GPU `trellis_gpu.py`, and where these cannot be had torch; all do the same
operations in the same order (Viterbi).
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pocketllm.codec import compiled
from pocketllm.errors import reason_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PathProblem:
    """One column of some strips; tensors are contiguous and on one device.

    points: [n, d] float32, those of each strip followed by some that are not put out. weights: [n] float32.
    tables: [C, d, 2^width] float32, over bit-reversed states. halves: [C, 2^width], |c|^2 / 2.
    which, after: [strips] int64, the table of a strip's own points, and of those that follow.
    start, stop: [strips] int64, the state before the first point, and the one to end in (-1: any).
    lengths, aheads: of each strip, how many points are its own, and how many follow.
    width, stride: of the trellis.
    """

    points: Tensor
    weights: Tensor
    tables: Tensor
    halves: Tensor
    which: Tensor
    after: Tensor
    start: Tensor
    stop: Tensor
    lengths: list[int]
    aheads: list[int]
    width: int
    stride: int

    @property
    def kept(self) -> int:
        """Bits that a state shares with the one before."""
        return self.width - self.stride


Search = Callable[[PathProblem], Tensor]
"""A problem -> the states [rows] int64 of the cheapest paths."""


def cheapest(problem: PathProblem) -> Tensor:
    """States [rows] int64 of the cheapest paths, by the fastest search there is."""
    device, d = problem.points.device, problem.points.shape[1]
    if device.type == "cpu" and compiled.trellis_available(d, problem.stride, problem.kept):
        return compiled.trellis_search(problem)
    return (_on_gpu(device) or in_torch)(problem)


@functools.cache
def _on_gpu(device: torch.device) -> Search | None:
    """The search in Triton, where it is there and finds on this device what torch finds."""
    if device.type != "cuda":
        return None
    try:
        from pocketllm.codec import trellis_gpu
    except ImportError:  # it comes with torch's CUDA builds
        return None
    wrong = differs(trellis_gpu.search, device)
    if wrong:
        logger.warning("paths cannot be searched with Triton on this GPU (%s); torch does it, slower", wrong)
    return None if wrong else trellis_gpu.search


def differs(search: Search, device: torch.device) -> str:
    """What is wrong with a search, tried on a few points; empty if it finds what torch finds."""
    generator = torch.Generator().manual_seed(0)
    points, tables = (torch.randn(size, generator=generator).to(device) for size in ((61, 2), (2, 2, 256)))
    which = torch.tensor([0, 1], device=device)
    problem = PathProblem(
        *(points, points.square().sum(dim=1), tables, tables.square().sum(dim=1) / 2, which, 1 - which),
        *(torch.zeros_like(which), torch.full_like(which, -1), [40, 17], [4, 0], 8, 3),
    )
    try:
        found = search(problem)
    except Exception as error:  # whatever a compiler or a driver may say
        return reason_of(error)
    return "" if torch.equal(found, in_torch(problem)) else "it finds other paths"


def in_torch(problem: PathProblem) -> Tensor:
    """The search in torch, strips of equal length at once."""
    lengths, aheads, device = problem.lengths, problem.aheads, problem.points.device
    out = torch.empty(sum(lengths), dtype=torch.int64, device=device)
    sizes = list(zip(lengths, aheads, strict=True))
    firsts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    skipped = torch.tensor([0, *aheads]).cumsum(0)[:-1]
    for length, ahead in dict.fromkeys(sizes):
        chosen = torch.tensor([n for n, size in enumerate(sizes) if size == (length, ahead)])
        into = (firsts[chosen][:, None] + torch.arange(length)).to(device)
        rows = ((firsts + skipped)[chosen][:, None] + torch.arange(length + ahead)).to(device)
        out[into] = _alike(problem, rows, chosen.to(device), length)[:, :length]
    return out


def _alike(problem: PathProblem, rows: Tensor, chosen: Tensor, own: int) -> Tensor:
    """States [B, T] of strips of one length.

    Args:
        rows: [B, T] of the problem's points, the first `own` of each strip its own. chosen: [B] strips.
    """
    points, weights = problem.points[rows], problem.weights[rows]
    tables = [(problem.tables[n], problem.halves[n]) for n in (problem.which[chosen], problem.after[chosen])]
    start, stop, kept, choices = (
        problem.start[chosen],
        problem.stop[chosen],
        problem.kept,
        1 << problem.stride,
    )
    table, half = tables[0]
    batch, length, d = points.shape
    scaled = points * weights[..., None]
    cost = torch.full((batch, half.shape[1]), torch.inf, device=points.device)
    cost.scatter_(1, start[:, None], 0.0)
    back = torch.empty(length, batch, 1 << kept, dtype=torch.uint8, device=points.device)
    for t in range(length):
        if t == own:
            table, half = tables[1]
        previous = cost.reshape(batch, choices, 1 << kept)
        least = previous.amin(dim=1)
        # The first of equals wins on every device.
        back[t] = (previous == least[:, None]).to(torch.uint8).argmax(dim=1)
        branch = half * weights[:, t, None]
        for i in range(d):
            branch = branch - scaled[:, t, i, None] * table[:, i]
        cost = least.repeat_interleave(choices, dim=1) + branch
        if t % 16 == 15:  # keep magnitudes small
            cost = cost - cost.amin(dim=1, keepdim=True)
    state = torch.where(stop < 0, cost.argmin(dim=1), stop)
    out = torch.empty(batch, length, dtype=torch.int64, device=points.device)
    for t in range(length - 1, -1, -1):
        out[:, t] = state
        group = state >> problem.stride
        state = (back[t].gather(1, group[:, None])[:, 0].long() << kept) | group
    return out
