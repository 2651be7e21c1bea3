"""Indices on a trellis: windows onto a stream of bits, and the codebook that is fitted to their paths.

Every index shares bits with the previous one, so a large codebook costs few bits: an index is a window of `width`
bits onto a stream, and the next window starts `stride` bits later. Each index thus chooses from 2^width codewords but
adds only `stride` bits, and the cheapest path through all indices is found by Viterbi's algorithm (`PathSearch`, with
its recursion in kernels/). At equal bits the error of a Gaussian source is about 20 to 25 percent below that of
independent indices. A path runs down the rows of one column of subvectors and continues in the next column, so that
error feedback can be applied between columns. The rows are cut into strips with independent paths (they are searched
in parallel, and error feedback is also applied between strips); the bits before a strip's first window are zero. Short
strips lose about 2 / rows of the error each.

On a `HashedTrellis` (hashed_table.py) a window is not the number of a codeword: it is hashed to the numbers of a few
codewords out of 256, one for each component of the subvector. That decodes several times faster.

Source: the bitshift trellis of QTIP (arXiv 2406.11235), here with a learned codebook.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pocketllm.codec.codebook import FittedCodebook, centroids, codebook_utilization
from pocketllm.codec.kernels import select
from pocketllm.codec.kernels.reference import PathProblem
from pocketllm.codec.packing import pack, packed_bytes, strip_places, unpack
from pocketllm.codec.subvectors import strip_count, strip_lengths
from pocketllm.config import CodecConfig, CompressConfig
from pocketllm.config.constants import LOOKAHEAD_ROWS, STRIP_ROWS, TRELLIS_STEPS


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
    chosen_jointly = True
    mixes_rates = True
    rates = TRELLIS_STEPS  # (d, stride) that a plan chooses from

    @classmethod
    def offered(cls, config: CompressConfig) -> list[tuple[int, Trellis]]:
        """(vector_len, form) that a plan chooses from."""
        width = config.codec.trellis_width
        assert width is not None
        return [
            (d, cls(width, stride))
            for d, stride in cls.rates
            if stride <= width and config.vector_len in (None, d)
        ]

    def has_enough(self, points: int) -> bool:
        """Whether a codebook can be fitted to so many subvectors: any number, since they may be drawn repeatedly."""
        return True

    @property
    def codebook_size(self) -> int:
        """K."""
        return 1 << self.width

    @property
    def window(self) -> int:
        """Bits of an index that is hashed; 0 if it is the number of a codeword."""
        return 0

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
        count = strip_count(rows, self.strip_rows)
        length, longer = divmod(rows, count)
        more, usual = (packed_bytes(n * per_row, self.stride) for n in (length + 1, length))
        return longer * more + (count - longer) * usual

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

    def strips(self, rows: int) -> int:
        """Number of parts of the stream that can be read from their start."""
        return strip_count(rows, self.strip_rows)

    def first_bits(self, rows: Tensor, count: int, per_row: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `Independent.first_bits`; the bits before the first window of a strip count as zero."""
        ends, lengths, floors = strip_places(count, self.strip_rows, per_row, self.stride, rows.device)
        strip = torch.searchsorted(ends, rows, right=True)
        floor, length = floors[strip], lengths[strip]
        first = floor + (rows - ends[strip] + length) * self.stride - self.kept
        return first, length * self.stride, floor

    def columns(self, rows: int, device: torch.device, in_strips: bool) -> TrellisColumns:
        """The choice of indices column by column; paths run down strips in any case."""
        return TrellisColumns(strip_lengths(rows, self.strip_rows), self.width, self.stride, device)

    def table(self, decoded: Tensor) -> Tensor:
        """What each index decodes to, [2^width, d], from the decoded codebook [K, d]."""
        return decoded

    def codewords(self, indices: Tensor) -> Tensor:
        """The codeword of each index (on a hashed trellis: that of component 0)."""
        return indices

    def fit_codebook(self, points: Tensor, iterations: int, seed: int) -> FittedCodebook:
        """Lloyd's algorithm with cheapest paths in place of nearest codewords.

        Args:
            points: [N, d] float32, in random order.
        """
        codebook = self.first_codebook(points, seed)
        search = PathSearch(self.width, self.stride, points.device)
        lengths = strip_lengths(len(points), self.strip_rows)
        start = search.first_state(len(lengths))
        which, weights = torch.zeros_like(start), torch.ones(len(points), device=points.device)
        errors, indices = list[float](), torch.empty(0, dtype=torch.int64)
        energy = max(float(points.square().sum()), 1e-30)
        for _ in range(max(1, iterations)):
            table = self.table(codebook)
            indices = search.search(points, weights, search.ordered(table[None]), which, lengths, start)
            errors.append(float((points - table[indices]).square().sum()) / energy)
            codebook = self.refitted(points, indices, codebook)
        counts = torch.bincount(self.codewords(indices), minlength=self.codebook_size)
        return FittedCodebook(codebook, tuple(errors), codebook_utilization(counts))

    def first_codebook(self, points: Tensor, seed: int) -> Tensor:
        """[K, d] points drawn with `seed`: a trellis works well if codewords are random over states."""
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randint(len(points), (self.codebook_size,), generator=generator).to(points.device)
        return points[drawn].float()

    def refitted(self, points: Tensor, indices: Tensor, previous: Tensor) -> Tensor:
        """The best codebook [K, d] for given indices [N] of points [N, d]."""
        return centroids(points, indices, previous)

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


class TrellisColumns:
    """Chooses the indices of a column as one path for each strip of rows; see `ColumnChoice`."""

    def __init__(self, lengths: list[int], width: int, stride: int, device: torch.device) -> None:
        self.lengths = self.together = lengths
        self.lookahead, self.nearest_is_slow = LOOKAHEAD_ROWS, True
        self.search = PathSearch(width, stride, device)
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
        tables = tables[..., self.order, :]  # bit-reversed: the bits that survive a step lie together
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
