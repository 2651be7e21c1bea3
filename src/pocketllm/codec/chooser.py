"""How the indices of one column of subvectors are chosen: each by itself, or as a path down each strip of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from pocketllm.codec.codebook import Searcher
from pocketllm.codec.trellis import PathSearch, Trellis, strip_lengths

_AHEAD = 4  # rows of the next column that a path is to be good for


class Independent:
    """Chooses every index by itself."""

    def __init__(self, rows: int, strip_rows: int) -> None:
        self.lengths, self.ahead = strip_lengths(rows, strip_rows), 0
        self.together = [1] * rows  # rows that are better or worse together

    def prepared(self, tables: Tensor) -> list[Searcher]:
        """What `first` and `again` want of tables [C, K, d]."""
        return [Searcher(table) for table in tables]

    def first(
        self,
        points: Tensor,
        weights: Tensor,
        tables: list[Searcher],
        which: Tensor,
        lengths: list[int],
        before: Tensor,
        aheads: list[int],
    ) -> Tensor:
        """Indices of one column of some strips.

        Args:
            points: [rows, d], those of each strip followed by some of its next column. weights: [rows].
            which: [strips], the table of each. lengths, aheads: how many points are of either column.
            before: [strips] the index that comes before.
        """
        sizes = [size for pair in zip(lengths, aheads, strict=True) for size in pair]
        parts, numbers = points.split(sizes)[::2], which.tolist()
        if len(set(numbers)) == 1:
            return tables[numbers[0]].nearest(torch.cat(parts))
        return torch.cat([tables[n].nearest(part) for n, part in zip(numbers, parts, strict=True)])

    def again(self, points: Tensor, weights: Tensor, table: Tensor, before: Tensor, now: Tensor) -> Tensor:
        """Better indices of a column than `now` [rows], such that the columns after it can stay as they are."""
        return Searcher(table).nearest(points)


class OnTrellis:
    """Chooses the indices of a column as one path for each strip of rows."""

    def __init__(self, rows: int, trellis: Trellis, device: torch.device) -> None:
        self.search = PathSearch(trellis, device)
        self.lengths = self.together = strip_lengths(rows, trellis.strip_rows)
        self.ahead = _AHEAD
        self.last = torch.tensor(self.lengths, device=device).cumsum(0) - 1

    def prepared(self, tables: Tensor) -> tuple[Tensor, Tensor]:
        return self.search.ordered(tables)

    def first(
        self,
        points: Tensor,
        weights: Tensor,
        tables: tuple[Tensor, Tensor],
        which: Tensor,
        lengths: list[int],
        before: Tensor,
        aheads: list[int],
    ) -> Tensor:
        return self.search.search(points, weights, tables, which, lengths, before, None, aheads)

    def again(self, points: Tensor, weights: Tensor, table: Tensor, before: Tensor, now: Tensor) -> Tensor:
        tables, which = self.search.ordered(table[None]), torch.zeros_like(before)
        return self.search.search(points, weights, tables, which, self.lengths, before, now[self.last])


Chooser = Independent | OnTrellis
