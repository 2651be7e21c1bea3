"""Cheapest paths through a bitshift trellis on a GPU, a Triton program for each strip (see trellis_form.py).

The same operations in the same order as in torch, without fused ones.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pocketllm.codec.kernels.reference import PathProblem


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _paths(  # type: ignore[no-untyped-def]
    points,
    weights,
    tables,
    halves,
    which,
    after,
    start,
    stop,
    lengths,
    lookahead,
    firsts,
    outs,
    back,
    out,
    longest,
    kept: tl.constexpr,
    stride: tl.constexpr,
    d: tl.constexpr,
):
    strip = tl.program_id(0)
    groups: tl.constexpr = 1 << kept
    choices: tl.constexpr = 1 << stride
    states: tl.constexpr = groups * choices
    state, group = tl.arange(0, states), tl.arange(0, groups)
    own, other = tl.load(which + strip), tl.load(after + strip)
    first, length = tl.load(firsts + strip), tl.load(lengths + strip)
    total = length + tl.load(lookahead + strip)
    steps = back + strip * longest * groups
    cost = tl.where(state == tl.load(start + strip), 0.0, float("inf"))
    for t in range(0, total):
        previous = tl.reshape(cost, (choices, groups))
        least = tl.min(previous, axis=0)
        choice = tl.argmin(previous, axis=0)  # the first of equals
        tl.store(steps + t * groups + group, choice.to(tl.uint8))
        table = tl.where(t < length, own, other)
        weight = tl.load(weights + first + t)
        branch = tl.load(halves + table * states + state) * weight
        for i in tl.static_range(d):
            scaled = tl.load(points + (first + t) * d + i) * weight
            branch = branch - scaled * tl.load(tables + (table * d + i) * states + state)
        spread = tl.reshape(tl.broadcast_to(least[:, None], (groups, choices)), (states,))
        cost = spread + branch
        if t % 16 == 15:  # keep magnitudes small
            cost = cost - tl.min(cost, axis=0)
    tl.debug_barrier()  # what other threads have stored is read below
    end = tl.load(stop + strip)
    at = tl.where(end < 0, tl.argmin(cost, axis=0).to(tl.int64), end)
    for back_by in range(0, total):
        t = total - 1 - back_by
        tl.store(out + tl.load(outs + strip) + t, at, mask=t < length)
        chosen = tl.load(steps + t * groups + (at >> stride))
        at = (chosen.to(tl.int64) << kept) | (at >> stride)


def cheapest_paths(problem: PathProblem) -> Tensor:
    """States [rows] int64 of the cheapest paths."""
    device, strips = problem.points.device, len(problem.lengths)
    own, more = (torch.tensor(sizes, device=device) for sizes in (problem.lengths, problem.lookahead))
    longest = int((own + more).max())
    back = torch.empty(strips * longest << problem.kept, dtype=torch.uint8, device=device)
    out = torch.empty(sum(problem.lengths), dtype=torch.int64, device=device)
    firsts = (own + more).cumsum(0) - own - more
    launch: Any = _paths[(strips,)]
    launch(
        problem.points,
        problem.weights,
        problem.tables,
        problem.halves,
        problem.which,
        problem.after,
        problem.start,
        problem.stop,
        own,
        more,
        firsts,
        own.cumsum(0) - own,
        back,
        out,
        longest,
        kept=problem.kept,
        stride=problem.stride,
        d=problem.points.shape[1],
        num_warps=8,
        enable_fp_fusion=False,
    )
    return out
