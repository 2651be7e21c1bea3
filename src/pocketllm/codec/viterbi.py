"""Cheapest paths through a bitshift trellis (Viterbi's algorithm): the search of trellis-coded indices.

The recursion itself is in kernels/: `reference.py` has it in torch, `cpu.py` and `triton.py` do the same
operations in the same order.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pocketllm.codec.kernels import select
from pocketllm.codec.kernels.reference import PathProblem


class PathSearch:
    """Cheapest paths for one column of each strip, all strips at once.

    Args:
        width: bits of a window. stride: bits from one window to the next. device: of the points.
    """

    def __init__(self, width: int, stride: int, device: torch.device) -> None:
        self.width, self.stride = width, stride
        self.order = reversed_bits(width).to(device)

    def first_state(self, strips: int) -> Tensor:
        """[strips] int64: the window before a strip's first one, all of whose bits are zero."""
        return torch.zeros(strips, dtype=torch.int64, device=self.order.device)

    def ordered(self, tables: Tensor) -> tuple[Tensor, Tensor]:
        """Tables [..., 2^width, d] as the search takes them: [..., d, 2^width], and |c|^2 / 2."""
        # Inside, states are bit-reversed: the bits that survive a step are the low ones and lie together.
        tables = tables[..., self.order, :]
        return tables.transpose(-1, -2).contiguous(), tables.square().sum(dim=-1) / 2

    def search(
        self,
        points: Tensor,
        weights: Tensor,
        tables: tuple[Tensor, Tensor],
        which: Tensor,
        lengths: list[int],
        start: Tensor,
        *,
        end: Tensor | None = None,
        lookahead: list[int] | None = None,
    ) -> Tensor:
        """Indices of the paths of least sum over rows of weight * |point - table[index]|^2.

        Args:
            points: [rows, d] float32. weights: [rows] float32, positive.
            tables: what `ordered` makes of tables [C, 2^width, d]. which: [strips] int64, the table of each.
            lengths: rows of each strip. start: [strips] int64, the index before its first row.
            end: [strips] int64, the index each strip must end with; None leaves it free.
            lookahead: number of points at the end of each strip that belong to the next column and use the table
                after the strip's own: they count in the search, but the returned path does not include them.

        Returns:
            [rows] int64.
        """
        start = self.order[start]
        problem = PathProblem(
            points=points.contiguous(),
            weights=weights.contiguous(),
            tables=tables[0],
            halves=tables[1],
            which=which,
            after=(which + 1).clamp(max=len(tables[0]) - 1),
            start=start,
            stop=torch.full_like(start, -1) if end is None else self.order[end],
            lengths=lengths,
            lookahead=lookahead or [0] * len(lengths),
            width=self.width,
            stride=self.stride,
        )
        return self.order[select.cheapest_paths(problem)]


def reversed_bits(width: int) -> Tensor:
    """[2^width] int64 permutation that reverses the bits of an index; its own inverse."""
    index = torch.arange(1 << width)
    found = torch.zeros_like(index)
    for bit in range(width):
        found |= ((index >> bit) & 1) << (width - 1 - bit)
    return found
