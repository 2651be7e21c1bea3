"""Cheapest paths through a bitshift trellis on a GPU, a Triton program for each strip (see trellis_form.py).

The same operations in the same order as in torch, without fused ones. Strips of several problems can be searched in one
launch: a strip alone does not fill a multiprocessor, and those of a matrix not the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pocketllm.codec.kernels.reference import PathProblem

_ALIGNED = 16  # bytes: then a thread reads four numbers at once


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _numbers(base, strips, n):  # type: ignore[no-untyped-def]
    """An array that lies as many numbers behind `base` as field n of a strip says."""
    return base + tl.multiple_of(tl.load(strips + n), 4)  # 16 bytes


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _trace_back(end, total, length, steps, out, groups, kept, stride):  # type: ignore[no-untyped-def]
    """Follow the noted choices from the last state; states of the strip's own points go to `out`."""
    for back_by in range(0, total):
        t = total - 1 - back_by
        tl.store(out + t, end, mask=t < length)
        chosen = tl.load(steps + t * groups + (end >> stride))
        end = (chosen.to(tl.int64) << kept) | (end >> stride)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _paths(  # type: ignore[no-untyped-def]
    base,
    strips,
    which,
    after,
    start,
    stop,
    back,
    out,
    longest,
    kept: tl.constexpr,
    stride: tl.constexpr,
    d: tl.constexpr,
):
    """strips: [n, 8], where points, weights, tables and halves lie (see `_numbers`), first point, first row of `out`,
    points of its own, points that follow."""
    strip = tl.program_id(0)
    groups: tl.constexpr = 1 << kept
    choices: tl.constexpr = 1 << stride
    states: tl.constexpr = groups * choices
    state, group = tl.arange(0, states), tl.arange(0, groups)
    own, other, fields = tl.load(which + strip), tl.load(after + strip), strips + strip * 8
    first, length = tl.load(fields + 4), tl.load(fields + 6)
    points, weights = _numbers(base, fields, 0) + first * d, _numbers(base, fields, 1) + first
    tables, halves = _numbers(base, fields, 2), _numbers(base, fields, 3)
    total = length + tl.load(fields + 7)
    steps = back + strip * longest * groups
    cost = tl.where(state == tl.load(start + strip), 0.0, float("inf"))
    for t in range(0, total):
        previous = tl.reshape(cost, (choices, groups))
        least = tl.min(previous, axis=0)
        choice = tl.argmin(previous, axis=0)  # the first of equals
        tl.store(steps + t * groups + group, choice.to(tl.uint8))
        table = tl.where(t < length, own, other)
        weight = tl.load(weights + t)
        branch = tl.load(halves + table * states + state) * weight
        for i in tl.static_range(d):
            scaled = tl.load(points + t * d + i) * weight
            branch = branch - scaled * tl.load(tables + (table * d + i) * states + state)
        spread = tl.reshape(tl.broadcast_to(least[:, None], (groups, choices)), (states,))
        cost = spread + branch
        if t % 16 == 15:  # keep magnitudes small
            cost = cost - tl.min(cost, axis=0)
    tl.debug_barrier()  # what other threads have stored is read below
    end = tl.load(stop + strip)
    end = tl.where(end < 0, tl.argmin(cost, axis=0).to(tl.int64), end)
    _trace_back(end, total, length, steps, out + tl.load(fields + 5), groups, kept, stride)


def cheapest_paths(problem: PathProblem) -> Tensor:
    """States [rows] int64 of the cheapest paths."""
    return cheapest_paths_of([problem])[0]


def cheapest_paths_of(problems: Sequence[PathProblem]) -> list[Tensor]:
    """The same of several problems on one device: those of one shape of trellis and points in one launch."""
    alike: dict[tuple[int, int, int], list[int]] = {}
    for number, problem in enumerate(problems):
        alike.setdefault((problem.width, problem.stride, problem.points.shape[1]), []).append(number)
    found: dict[int, Tensor] = {}
    for numbers in alike.values():
        some = [problems[number] for number in numbers]
        rows = [sum(problem.lengths) for problem in some]
        found |= zip(numbers, _launched(some).split(rows), strict=True)
    return [found[number] for number in range(len(problems))]


def _launched(problems: list[PathProblem]) -> Tensor:
    """States of the cheapest paths of all problems, one after another."""
    arrays = [[_aligned(a) for a in (p.points, p.weights, p.tables, p.halves)] for p in problems]
    base, strips, row = arrays[0][2], list[tuple[int, ...]](), 0
    for problem, own in zip(problems, arrays, strict=True):
        places = [(array.data_ptr() - base.data_ptr()) // 4 for array in own]
        point = 0
        for length, more in zip(problem.lengths, problem.lookahead, strict=True):
            strips.append((*places, point, row, length, more))
            point, row = point + length + more, row + length
    some, longest = problems[0], max(length + more for *_, length, more in strips)
    ends = zip(*((p.which, p.after, p.start, p.stop) for p in problems), strict=True)
    out = base.new_empty(row, dtype=torch.int64)
    launch: Any = _paths[(len(strips),)]
    launch(
        base,
        torch.tensor(strips, device=base.device),
        *(torch.cat(parts) for parts in ends),
        base.new_empty(len(strips) * longest << some.kept, dtype=torch.uint8),
        out,
        longest,
        kept=some.kept,
        stride=some.stride,
        d=some.points.shape[1],
        num_warps=8,
        enable_fp_fusion=False,
    )
    return out


def _aligned(array: Tensor) -> Tensor:
    """An array that begins where a thread can read several numbers at once."""
    return array.clone() if array.data_ptr() % _ALIGNED else array
