"""Forms of index: how the indices of a matrix are chosen and stored.

`Independent` indices are chosen one by one and stored in `width` bits each (the paper).

On a `Trellis` every index shares bits with the previous one, so a large codebook costs few bits: an index is a
window of `width` bits onto a stream, and the next window starts `stride` bits later. Each index thus chooses from
2^width codewords but adds only `stride` bits, and a path through all indices is found by dynamic programming
(viterbi.py). At equal bits the error of a Gaussian source is about 20 to 25 percent below that of independent
indices. A path runs down the rows of one column of subvectors and continues in the next column, so that error
feedback can be applied between columns. The rows are cut into strips with independent paths (they are searched in
parallel, and error feedback is also applied between strips); the bits before a strip's first window are zero.
Short strips lose about 2 / rows of the error each.

Source: the bitshift trellis of QTIP (arXiv 2406.11235), here with a learned codebook.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pocketllm.codec.codebook import Searcher, centroids, codebook_utilization, kmeans_codebook
from pocketllm.codec.packing import index_width, pack, packed_bytes, unpack
from pocketllm.codec.viterbi import PathSearch
from pocketllm.config import CodecConfig
from pocketllm.config.constants import LOOKAHEAD_ROWS, STRIP_ROWS


def form_for(codebook_size: int, stride: int, strip_rows: int = STRIP_ROWS) -> IndexForm:
    """The form of the indices of a stored matrix or a plan.

    Args:
        codebook_size: K. stride: bits that each index adds on a trellis, 0 for independent indices.
        strip_rows: approximate number of rows of a strip.

    Raises:
        ValueError: a stride that does not fit the codebook.
    """
    if not stride:
        return Independent(codebook_size, strip_rows)
    width = index_width(codebook_size)
    if stride > width or codebook_size != 1 << width:
        raise ValueError(f"stride {stride} does not fit a codebook of {codebook_size}")
    return Trellis(width, stride, strip_rows)


@dataclass(frozen=True)
class FittedCodebook:
    """A codebook, and how well it fits its points.

    table: [K, d] float32. errors: mean square error over the mean square of the points, per iteration.
    utilization: share of the codewords that the points use. The last two are set only if the fit computes them.
    """

    table: Tensor
    errors: tuple[float, ...] = ()
    utilization: float = 1.0


@dataclass(frozen=True)
class Independent:
    """Independent indices.

    codebook_size: K. strip_rows: approximate number of rows that compensate at once for those above them, if error
    feedback also runs down the rows.
    """

    codebook_size: int
    strip_rows: int = STRIP_ROWS
    stride = 0
    trains_networks = True

    @property
    def width(self) -> int:
        """Bits of an index."""
        return index_width(self.codebook_size)

    @property
    def bits(self) -> int:
        """Stored bits of an index."""
        return self.width

    def nbytes(self, rows: int, per_row: int) -> int:
        """Bytes of [rows, per_row] packed indices."""
        return packed_bytes(rows * per_row, self.width)

    def pack(self, indices: Tensor) -> Tensor:
        """[rows, n] integers in [0, K) -> uint8 stream, row after row."""
        return pack(indices.reshape(-1), self.width)

    def unpack(self, stream: Tensor, rows: int, per_row: int) -> Tensor:
        """Inverse of `pack`: [rows, per_row] int32.

        Raises:
            FormatError: the stream has another length.
        """
        return unpack(stream, self.width, rows * per_row).reshape(rows, per_row)

    def columns(self, rows: int, device: torch.device, in_strips: bool) -> IndependentColumns:
        """The choice of indices column by column.

        Args:
            in_strips: whether rows compensate for those above them, strip by strip.
        """
        return IndependentColumns(strip_lengths(rows, self.strip_rows if in_strips else rows))

    def fit_codebook(self, points: Tensor, iterations: int, seed: int) -> FittedCodebook:
        """k-means on points [N, d] float32, N >= K."""
        return FittedCodebook(kmeans_codebook(points, self.codebook_size, iterations, seed))

    def predicted_nmse(self, vector_len: int) -> float:
        """Error for a unit-variance Gaussian; see `predicted_nmse`."""
        return predicted_nmse(vector_len, math.log2(self.codebook_size))

    def fit_errors(self, config: CodecConfig) -> int:
        """How many errors the fit of a codec notes: one for each epoch."""
        return config.epochs


@dataclass(frozen=True)
class Trellis:
    """Indices on a trellis: windows of `width` bits (K = 2^width), `stride` bits apart, 1 <= stride <= width.

    strip_rows: approximate number of rows of a strip.
    """

    width: int
    stride: int
    strip_rows: int = STRIP_ROWS
    # Rotated rows of unit scale follow one distribution, so networks trained for their reconstruction have nothing to
    # add to the codebook: they start as the identity and serve the tuning that comes after.
    trains_networks = False

    @property
    def codebook_size(self) -> int:
        """K."""
        return 1 << self.width

    @property
    def bits(self) -> int:
        """Stored bits of an index."""
        return self.stride

    @property
    def kept(self) -> int:
        """Bits that a window shares with the previous one."""
        return self.width - self.stride

    def windows(self, steps: Tensor) -> Tensor:
        """New bits [..., T] int -> indices [..., T] int32; the newest bits of a window are its highest."""
        steps = steps.to(torch.int32)
        length, shift, back = steps.shape[-1], self.kept, 0
        found = torch.zeros_like(steps)
        while shift > -self.stride and back < length:
            shifted = steps[..., : length - back]
            found[..., back:] |= shifted << shift if shift >= 0 else shifted >> -shift
            shift, back = shift - self.stride, back + 1
        return found

    def steps(self, indices: Tensor) -> Tensor:
        """Inverse of `windows`: the new bits of each index."""
        return indices >> self.kept

    def nbytes(self, rows: int, per_row: int) -> int:
        """Bytes of [rows, per_row] packed indices; every strip begins on a byte."""
        lengths = strip_lengths(rows, self.strip_rows)
        return sum(packed_bytes(length * per_row, self.stride) for length in lengths)

    def pack(self, indices: Tensor) -> Tensor:
        """[rows, n] indices that form paths -> uint8 stream, strip after strip, and column after column in each."""
        parts = self.steps(indices).split(strip_lengths(indices.shape[0], self.strip_rows))
        return torch.cat([pack(part.T.reshape(-1), self.stride) for part in parts])

    def unpack(self, stream: Tensor, rows: int, per_row: int) -> Tensor:
        """Inverse of `pack`: [rows, per_row] int32.

        Raises:
            FormatError: the stream has another length.
        """
        out = torch.empty(rows, per_row, dtype=torch.int32, device=stream.device)
        first, offset = 0, 0
        for length in strip_lengths(rows, self.strip_rows):
            nbytes = packed_bytes(length * per_row, self.stride)
            last = first + length == rows
            part = stream[offset:] if last else stream[offset : offset + nbytes]
            steps = unpack(part, self.stride, length * per_row)
            out[first : first + length] = self.windows(steps).reshape(per_row, length).T
            first, offset = first + length, offset + nbytes
        return out

    def columns(self, rows: int, device: torch.device, in_strips: bool) -> TrellisColumns:
        """The choice of indices column by column; paths run down strips with or without feedback between rows."""
        return TrellisColumns(strip_lengths(rows, self.strip_rows), self, device)

    def fit_codebook(self, points: Tensor, iterations: int, seed: int) -> FittedCodebook:
        """Lloyd's algorithm with cheapest paths in place of nearest codewords.

        Starts from points drawn with `seed`: a trellis works well if codewords are random over states.

        Args:
            points: [N, d] float32, in random order.
        """
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(points), (self.codebook_size,), generator=generator).to(points.device)
        table, search = points[drawn].float(), PathSearch(self.width, self.stride, points.device)
        lengths = strip_lengths(len(points), self.strip_rows)
        start = search.first_state(len(lengths))
        which, weights = torch.zeros_like(start), torch.ones(len(points), device=points.device)
        errors, indices = list[float](), torch.empty(0, dtype=torch.int64)
        for _ in range(max(1, iterations)):
            tables = search.ordered(table[None])
            indices = search.search(points, weights, tables, which, lengths, start)
            errors.append(_relative_error(points, table[indices]))
            table = centroids(points, indices, table)
        counts = torch.bincount(indices, minlength=self.codebook_size)
        return FittedCodebook(table, tuple(errors), codebook_utilization(counts))

    def predicted_nmse(self, vector_len: int) -> float:
        """Error for a unit-variance Gaussian at b bits per weight: 2^(-2 b) (1 + 1.3 b / width).

        The excess over Shannon's bound was fitted to codebooks trained on Gaussian numbers, for widths 10 to 14
        and 1.25 to 4 bits per weight, where it is within 4 percent.
        """
        bits = self.bits / vector_len
        return float(4.0**-bits * (1 + 1.3 * bits / self.width))

    def fit_errors(self, config: CodecConfig) -> int:
        """How many errors the fit of a codec notes: one for each iteration."""
        return max(1, config.kmeans_iterations)


IndexForm = Independent | Trellis


class ColumnChoice(Protocol):
    """How the indices of one column of subvectors are chosen, for all strips of rows at once.

    lengths: rows of each strip. together: rows whose losses are compared as one sum. lookahead: rows of the next
    column that are considered when the indices of a column are chosen. nearest_is_slow: whether the fallback, a
    search for the nearest codewords, costs as much as the choice itself.
    """

    lengths: list[int]
    together: list[int]
    lookahead: int
    nearest_is_slow: bool

    def prepared(self, tables: Tensor) -> Any:
        """Prepare tables [C, K, d] for `first`."""

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
            which: [strips], the table of each. lengths, lookahead: number of points of either column.
            before: [strips] the preceding index.
        """

    def again(self, points: Tensor, weights: Tensor, table: Tensor, before: Tensor, now: Tensor) -> Tensor:
        """Better indices of a column than `now` [rows] that leave the later columns unchanged."""


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


class TrellisColumns:
    """Chooses the indices of a column as one path for each strip of rows; see `ColumnChoice`."""

    def __init__(self, lengths: list[int], trellis: Trellis, device: torch.device) -> None:
        self.lengths = self.together = lengths
        self.lookahead, self.nearest_is_slow = LOOKAHEAD_ROWS, True
        self.search = PathSearch(trellis.width, trellis.stride, device)
        self.last = torch.tensor(lengths, device=device).cumsum(0) - 1

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
        lookahead: list[int],
    ) -> Tensor:
        return self.search.search(points, weights, tables, which, lengths, before, lookahead=lookahead)

    def again(self, points: Tensor, weights: Tensor, table: Tensor, before: Tensor, now: Tensor) -> Tensor:
        tables, which = self.search.ordered(table[None]), torch.zeros_like(before)
        return self.search.search(points, weights, tables, which, self.lengths, before, end=now[self.last])


def predicted_nmse(vector_len: int, index_bits: float) -> float:
    """Error of a good K-point quantizer in d dimensions, for a unit-variance Gaussian; K = 2^index_bits.

        D(d, K) = 2 pi G_d ((d + 2) / d)^((d + 2) / 2) K^(-2/d),   G_d = Gamma(d/2 + 1)^(2/d) / ((d + 2) pi)

    Source: Zador 1982; Gersho 1979; G_d is the sphere bound.
    """
    d = vector_len
    sphere = math.gamma(d / 2 + 1) ** (2 / d) / ((d + 2) * math.pi)
    distortion = 2 * math.pi * sphere * ((d + 2) / d) ** ((d + 2) / 2) * 2.0 ** (-2 * index_bits / d)
    return min(1.0, distortion)


def strip_lengths(rows: int, strip_rows: int) -> list[int]:
    """Lengths of the strips that `rows` are cut into: equal but for one row, the longer ones first."""
    count = max(1, round(rows / strip_rows))
    return [rows // count + (1 if strip < rows % count else 0) for strip in range(count)]


def _relative_error(points: Tensor, decoded: Tensor) -> float:
    """Squared distance over the energy of the points."""
    return float((points - decoded).square().sum()) / max(float(points.square().sum()), 1e-30)
