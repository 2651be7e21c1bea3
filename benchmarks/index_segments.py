"""Better short segments of the paths on a trellis, with the rest of each path pinned.

A window of `width` bits is the newest steps of a path, `stride` bits each (trellis_form.py). Changing some steps in a
row changes the windows of these steps and of the ceil(width / stride) - 1 that follow, and no others, so all
2^(steps * stride) alternatives can be tried. With gradient D and diagonal curvature C of the loss with respect to the
decoded indices, an alternative that moves these by m is predicted to lower the loss by

    gain = - sum (D m + C m^2 / 2)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pocketllm.codec.index_form import Trellis
from pocketllm.codec.subvectors import cut, strip_lengths

_NUMBERS_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class Segments:
    """Alternatives of S segments of a matrix.

    places: [S, touched] int64, their windows as numbers in the flattened indices [rows * n]; -1 past the end of a
        path.
    windows: [S, touched] int64, the new windows.
    gains: [S] float32, predicted; at least 0, that of no change.
    """

    places: Tensor
    windows: Tensor
    gains: Tensor

    def chosen(self, numbers: Tensor) -> Segments:
        """Some of them."""
        return Segments(self.places[numbers], self.windows[numbers], self.gains[numbers])

    def apart(self, most: int) -> Segments:
        """At most so many segments of the largest gains, best first, that share no window with a better one."""
        order = self.gains.argsort(descending=True, stable=True)
        order = order[self.gains[order] > 0]
        places = self.places[order]
        inside, rank = places >= 0, torch.arange(len(order))[:, None].expand_as(places)
        first = torch.full((int(self.places.max()) + 1,), len(order))
        first.scatter_reduce_(0, places[inside], rank[inside], "amin")
        alone = torch.where(inside, first[places.clamp(min=0)] == rank, True).all(dim=1)
        return self.chosen(order[alone][:most])

    def moves(self, indices: Tensor, table: Tensor) -> Tensor:
        """[S, touched, d]: how far they move what the indices [rows, n] decode to."""
        old = indices.reshape(-1)[self.places.clamp(min=0)].long()
        return (table[self.windows] - table[old]) * (self.places >= 0)[:, :, None]

    def applied(self, indices: Tensor) -> Tensor:
        """The indices [rows, n] with these segments in place of their own."""
        found = indices.clone().reshape(-1)
        inside = self.places >= 0
        found[self.places[inside]] = self.windows[inside].to(found.dtype)
        return found.reshape(indices.shape)


@dataclass(frozen=True)
class SegmentSearch:
    """Finds the best alternative of segments.

    form: of the indices. table: [2^width, d] float32, what each window decodes to. steps: of a segment.
    """

    form: Trellis
    table: Tensor
    steps: int = 2

    @property
    def touched(self) -> int:
        """Windows that change with a segment."""
        return self.steps - 1 + -(-self.form.width // self.form.stride)

    def places(self, rows: int, per_row: int) -> Tensor:
        """The windows of every segment, [S, touched] int64, as in `Segments`; indices are [rows, per_row]."""
        found, first = [], 0
        for length in strip_lengths(rows, self.form.strip_rows):
            numbers = torch.arange(first * per_row, (first + length) * per_row).view(length, per_row)
            path = torch.cat([numbers.T.reshape(-1), torch.full((self.touched - 1,), -1)])
            found.append(path.unfold(0, self.touched, 1)[: length * per_row - self.steps + 1])
            first += length
        return torch.cat(found)

    def bits(self) -> tuple[Tensor, Tensor]:
        """[touched] int64, the bits of each window that are pinned, and [touched, alternatives], those that are set."""
        stride, every = self.form.stride, (1 << self.form.stride) - 1
        alternatives = torch.arange(1 << (self.steps * stride))
        pinned = torch.full((self.touched,), (1 << self.form.width) - 1)
        values = torch.zeros(self.touched, len(alternatives), dtype=torch.int64)
        for window in range(self.touched):
            for step in range(min(self.steps, window + 1)):
                shift = self.form.kept - (window - step) * stride
                new = (alternatives >> (step * stride)) & every
                values[window] |= _shifted(new, shift)
                pinned[window] &= ~_shifted(torch.tensor(every), shift)
        return pinned, values

    def best(self, indices: Tensor, gradient: Tensor, curvature: Tensor, places: Tensor) -> Segments:
        """The best alternative of each segment.

        Args:
            indices: [rows, n] integer. gradient, curvature: [rows, columns] float32, in units of decoded indices.
            places: [S, touched], some of `places`.
        """
        pinned, values = self.bits()
        flat = indices.reshape(-1).long()
        slope, bend = (_per_window(values_of, self.table.shape[1]) for values_of in (gradient, curvature))
        windows, gains = [], []
        for part in places.split(max(1, _NUMBERS_AT_ONCE // values.numel())):
            inside, at = part >= 0, part.clamp(min=0)
            old = flat[at]
            new = (old & pinned)[:, :, None] | values
            gain = torch.zeros(len(part), values.shape[1])
            for component, column in enumerate(self.table.T.contiguous().unbind()):
                move = column[new] - column[old][:, :, None]
                d, c = (torch.where(inside, side[at, component], 0)[:, :, None] for side in (slope, bend))
                gain -= ((d + c / 2 * move) * move).sum(dim=1)
            most, which = gain.max(dim=1)
            windows.append(new.gather(2, which[:, None, None].expand(-1, self.touched, 1))[:, :, 0])
            gains.append(most.clamp(min=0))
        return Segments(places, torch.cat(windows), torch.cat(gains))


def _shifted(bits: Tensor, shift: int) -> Tensor:
    """Bits moved up by `shift`, or down if it is negative."""
    return bits << shift if shift >= 0 else bits >> -shift


def _per_window(values: Tensor, vector_len: int) -> Tensor:
    """[rows, columns] -> [rows * n, d]."""
    return cut(values, vector_len).reshape(-1, vector_len)
