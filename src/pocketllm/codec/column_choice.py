"""How the indices of one column of subvectors are chosen: independently here, as paths in trellis_form.py."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from pocketllm.codec.codebook import Searcher


class ColumnChoice(Protocol):
    """How the indices of one column of subvectors are chosen, for all strips of rows at once.

    lengths: rows of each strip. together: rows whose losses are compared as one sum. lookahead: rows of the next
    column that the indices of a column should suit, too. nearest_is_slow: whether looking for the nearest
    codewords, as a fallback, costs as much as the choice itself.
    """

    lengths: list[int]
    together: list[int]
    lookahead: int
    nearest_is_slow: bool

    def prepared(self, tables: Tensor) -> Any:
        """Tables [C, K, d] in the form that `first` takes."""

    def first(
        self,
        points: Tensor,
        weights: Tensor,
        tables: Any,
        which: Tensor,
        lengths: list[int],
        before: Tensor,
        lookahead: list[int],
    ) -> Tensor:
        """Indices [rows] of one column of some strips.

        Args:
            points: [rows, d], those of each strip followed by some of its next column. weights: [rows].
            which: [strips], the table of each. lengths, lookahead: how many points are of either column.
            before: [strips] the index that comes before.
        """

    def again(self, points: Tensor, weights: Tensor, table: Tensor, before: Tensor, now: Tensor) -> Tensor:
        """Better indices of a column than `now` [rows] that leave the columns after it unchanged."""


class IndependentColumns:
    """Chooses every index independently; see `ColumnChoice`."""

    def __init__(self, lengths: list[int]) -> None:
        self.lengths, self.lookahead, self.nearest_is_slow = lengths, 0, False
        self.together = [1] * sum(lengths)

    def prepared(self, tables: Tensor) -> list[Searcher]:
        return [Searcher(table) for table in tables]

    def first(
        self,
        points: Tensor,
        weights: Tensor,
        tables: list[Searcher],
        which: Tensor,
        lengths: list[int],
        before: Tensor,
        lookahead: list[int],
    ) -> Tensor:
        sizes = [size for pair in zip(lengths, lookahead, strict=True) for size in pair]
        parts, numbers = points.split(sizes)[::2], which.tolist()
        if len(set(numbers)) == 1:
            return tables[numbers[0]].nearest(torch.cat(parts))
        return torch.cat([tables[n].nearest(part) for n, part in zip(numbers, parts, strict=True)])

    def again(self, points: Tensor, weights: Tensor, table: Tensor, before: Tensor, now: Tensor) -> Tensor:
        return Searcher(table).nearest(points)


def strip_lengths(rows: int, strip_rows: int) -> list[int]:
    """Lengths of the strips that `rows` are cut into: equal but for one row, the longer ones first."""
    count = max(1, round(rows / strip_rows))
    return [rows // count + (1 if strip < rows % count else 0) for strip in range(count)]
