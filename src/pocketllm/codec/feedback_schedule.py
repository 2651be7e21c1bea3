"""The order in which error feedback encodes a matrix: strips of rows, each some columns behind the one above it.

All active strips are encoded at once. `ColumnFeedback` carries the error of a column of subvectors to
the columns after it, `RowFeedback` that of a strip to the strips below; feedback.py has the formulas.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pocketllm.codec.kernels import select
from pocketllm.config.constants import FEEDBACK_GROUP, STRIP_LAG


@dataclass(frozen=True)
class Place:
    """The state of the schedule: the active strips, and the current column of subvectors of each.

    strips: slice of the active ones. numbers, columns: of each, [active] int64. step: number of this place.
    last: number of the last column.
    """

    strips: slice
    numbers: Tensor
    columns: Tensor
    step: int
    last: int

    @property
    def has_next(self) -> Tensor:
        """[active] whether another column follows."""
        return self.columns < self.last

    @property
    def next(self) -> Place:
        """The same strips one column further; strips at their last column stay."""
        return Place(
            self.strips, self.numbers, (self.columns + 1).clamp(max=self.last), self.step + 1, self.last
        )


class Strips:
    """Rows as strips of equal length [strips, longest]; shorter ones are padded.

    Args:
        lengths: rows of each strip. columns: number of columns of subvectors. in_turn: whether strips wait for
            those above them.
    """

    def __init__(self, lengths: list[int], columns: int, in_turn: bool, device: torch.device) -> None:
        self.lengths, self.columns, self.lag = lengths, columns, STRIP_LAG if in_turn else 0
        sizes = torch.tensor(lengths, device=device)
        self.inside = torch.arange(max(lengths), device=device) < sizes[:, None]
        self.last = sizes - 1  # row of each strip

    def __iter__(self) -> Iterator[Place]:
        """Every place in turn."""
        count = len(self.lengths)
        for step in range(self.columns + self.lag * (count - 1)):
            strips = slice(0, count)
            if self.lag:
                first = max(0, -(-(step - self.columns + 1) // self.lag))
                strips = slice(first, min(count, step // self.lag + 1))
            numbers = torch.arange(strips.start, strips.stop, device=self.last.device)
            yield Place(strips, numbers, step - self.lag * numbers, step, self.columns - 1)

    def pad(self, values: Tensor) -> Tensor:
        """[rows, ...] -> [strips, longest, ...]; padded with ones, which can be divided by."""
        out = values.new_ones(*self.inside.shape, *values.shape[1:])
        out[self.inside] = values
        return out


class ColumnFeedback:
    """The targets that remain to be encoded, each strip shifted by its lag so that all active ones align.

    Feedback is applied immediately within a group of columns, and to later columns when the group ends.

    Args:
        weight: [rows, columns]. upper: U of the Hessian of the inputs; None for no feedback.
        d: columns of a subvector.
    """

    def __init__(self, strips: Strips, weight: Tensor, upper: Tensor | None, d: int) -> None:
        padded = strips.pad(weight)
        count, longest, columns = padded.shape
        self.d, self.shift = d, strips.lag * d
        self.edge = self.shift * (count - 1)
        self.left = weight.new_zeros(count, longest, columns + self.edge + d)
        for number in range(count):
            begin = number * self.shift
            self.left[number, :, begin : begin + columns] = padded[number]
        self.first = self.left.clone() if self.shift else self.left
        self.end = columns + self.edge
        self.group = max(d, FEEDBACK_GROUP // d * d)
        self.errors = weight.new_zeros(count, longest, self.group)
        self.upper, self.metric = None, torch.eye(d, device=weight.device).expand(columns // d, d, d)
        if upper is not None:
            blocks = [upper[j : j + d, j : j + d] for j in range(0, columns, d)]
            self.metric = torch.linalg.inv(torch.stack(blocks))  # U_JJ^-1 of every column [n, d, d]
            edges = (self.edge, self.edge + d) * 2
            self.upper = torch.nn.functional.pad(upper, edges)

    def wanted(self, at: Place) -> Tensor:
        """The current targets of the columns of a place: [active, longest, d]."""
        return self.left[at.strips, :, at.step * self.d : (at.step + 1) * self.d]

    def target(self, at: Place) -> Tensor:
        """The weights of the columns of a place, where strips take turns: [active, longest, d]."""
        return self.first[at.strips, :, at.step * self.d : (at.step + 1) * self.d]

    def feed(self, at: Place, error: Tensor) -> None:
        """Carry errors e [active, longest, d] to the right."""
        if self.upper is None:
            return
        here = at.step * self.d
        begin, after = here // self.group * self.group, here + self.d
        end = min(begin + self.group, self.end)
        self.errors[at.strips, :, here - begin : after - begin] = error
        if after < end:
            self.left[at.strips, :, after:end] -= error @ self._upper(at.strips, here, after, after, end)
        elif end < self.end:
            everywhere = slice(0, len(self.left))
            carried = self._upper(everywhere, begin, end, end, self.end)
            self.left[:, :, end : self.end] -= self.errors[:, :, : end - begin] @ carried
            self.errors.zero_()

    def _upper(self, strips: slice, top: int, bottom: int, begin: int, end: int) -> Tensor:
        """U of rows top:bottom and columns begin:end, each strip's shifted: [active, rows, columns]."""
        assert self.upper is not None
        if self.shift == 0:
            return self.upper[top:bottom, begin:end]
        pitch, back = self.upper.shape[1], self.edge - (strips.stop - 1) * self.shift
        size = strips.stop - strips.start, bottom - top, end - begin
        # From the last strip to the first, since strides cannot be negative.
        stride = self.shift * (pitch + 1), pitch, 1
        return self.upper.as_strided(size, stride, (top + back) * pitch + begin + back).flip(0)


class RowFeedback:
    """The corrections by which strips compensate for the errors of those above them.

    Nearby strips pass on their errors column by column. Strips further up have already finished the next group of
    columns, and pass on its errors in one product.

    diagonal: [strips, longest] what is left of G's diagonal then.

    Args:
        upper: V of the Hessian of the outputs [rows, rows]. d: columns of a subvector.
    """

    def __init__(self, strips: Strips, upper: Tensor, d: int) -> None:
        (count, longest), device = strips.inside.shape, upper.device
        place = strips.inside.reshape(-1).nonzero()[:, 0]
        full = torch.eye(count * longest, device=device)
        full[place[:, None], place] = upper
        blocks = full.reshape(count, longest, count, longest)
        number = torch.arange(count, device=device)
        inverse = torch.linalg.inv(blocks[number, :, number])
        self.diagonal = inverse.square().sum(dim=2)
        self.whiten = select.for_product(inverse.transpose(1, 2), d)  # V_SS^-T
        self.lag, self.count, self.longest = strips.lag, count, longest
        # A column reads `near` strips for each strip, and a group of lag * near columns all strips once.
        self.near = max(1, round(count**0.5 / 2))
        self.upper = torch.nn.functional.pad(full, (0, 0, self.near * longest, 0))  # none above the first
        nearby = torch.stack([self._above(s, s, s + self.near) for s in range(count)])
        self.nearby = select.for_product(nearby, d)
        self.kept = torch.zeros(strips.columns, len(self.upper), d, device=device)
        self.from_afar = torch.zeros(strips.columns, count, longest, d, device=device)

    def shift(self, at: Place, rows: int | None = None) -> Tensor:
        """The corrections of the strips' first rows in their columns, with the sign reversed: [active, rows, d]."""
        handed = self.kept[at.columns[:, None], self._rows(at.numbers, self.near)]
        near = select.product(self.nearby[at.strips, :rows], handed)
        return self.from_afar[at.columns, at.numbers, :rows] + near

    def feed(self, at: Place, error: Tensor) -> None:
        """Note Z of the columns of a place, given T - decoded [active, longest, d]."""
        rows = self._rows(at.numbers + self.near, 1)
        self.kept[at.columns[:, None], rows] = select.product(self.whiten[at.strips], error)
        if at.step % self.lag == 0:
            # Strips that are `lag` columns before a group, which those above strip - near have finished.
            for group, strip in enumerate(range(at.step // self.lag + 1, self.near, -self.near)):
                if strip < self.count:
                    self._gather(strip, group)

    def _gather(self, strip: int, group: int) -> None:
        """The corrections of a group of a strip's columns from strips further up."""
        size = self.lag * self.near
        columns, rows = slice(group * size, (group + 1) * size), slice(self.near * self.longest, None)
        errors = self.kept[columns, rows][:, : (strip - self.near) * self.longest]
        count, _, d = errors.shape
        carried = select.product(self._above(strip, self.near, strip), errors.transpose(0, 1).flatten(1))
        self.from_afar[columns, strip] = carried.reshape(self.longest, count, d).transpose(0, 1)

    def _above(self, strip: int, first: int, end: int) -> Tensor:
        """V_TS^T of a strip S and strips T, counted from `near` above the first: [longest, rows of T]."""
        here = slice(strip * self.longest, (strip + 1) * self.longest)
        return self.upper[first * self.longest : end * self.longest, here].T

    def _rows(self, first: Tensor, strips: int) -> Tensor:
        """Rows of `kept` of runs of strips, counted from `near` above the first: [active, rows]."""
        return first[:, None] * self.longest + torch.arange(strips * self.longest, device=first.device)
