"""Forms of index: how the indices of a matrix are chosen and stored.

`Independent` indices are chosen one by one and stored in `width` bits each (the paper).

On a `Trellis` every index shares bits with the previous one, so that a large codebook costs few bits
(trellis_form.py); on a `HashedTrellis` 256 codewords serve in place of a large codebook (hashed_table.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pocketllm.codec.codebook import FittedCodebook, Searcher, kmeans_codebook
from pocketllm.codec.hashed_table import ENTRIES, WINDOWS, HashedTrellis as HashedTrellis
from pocketllm.codec.packing import index_width, pack, packed_bytes, unpack
from pocketllm.codec.subvectors import strip_lengths
from pocketllm.codec.trellis_form import Trellis as Trellis
from pocketllm.config import CodecConfig, CompressConfig
from pocketllm.config.constants import STRIP_ROWS, VECTOR_LENS


def form_for(codebook_size: int, stride: int, strip_rows: int = STRIP_ROWS, window: int = 0) -> IndexForm:
    """The form of the indices of a stored matrix or a plan.

    Args:
        codebook_size: K. stride: bits that each index adds on a trellis, 0 for independent indices.
        strip_rows: approximate number of rows of a strip.
        window: bits of an index on a hashed trellis, 0 for the other forms.

    Raises:
        ValueError: a stride that does not fit the codebook or the window.
    """
    if window:
        if codebook_size != ENTRIES or not WINDOWS[0] <= window <= WINDOWS[1] or not 1 <= stride <= window:
            raise ValueError(
                f"stride {stride} and windows of {window} bits do not fit a hashed codebook of {codebook_size}"
            )
        return HashedTrellis(window, stride, strip_rows)
    if not stride:
        return Independent(codebook_size, strip_rows)
    width = index_width(codebook_size)
    if stride > width or codebook_size != 1 << width:
        raise ValueError(f"stride {stride} does not fit a codebook of {codebook_size}")
    return Trellis(width, stride, strip_rows)


def form_of(config: CodecConfig) -> type[IndexForm]:
    """The form of index that the settings select."""
    if config.trellis_width is None:
        return Independent
    return HashedTrellis if config.hashed else Trellis


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


@dataclass(frozen=True)
class Independent:
    """Independent indices.

    codebook_size: K. strip_rows: approximate number of rows that compensate at once for those above them, if error
    feedback also runs down the rows.
    """

    codebook_size: int
    strip_rows: int = STRIP_ROWS
    stride = 0
    window = 0  # bits of an index that is hashed
    chosen_jointly = (
        False  # whether the index of a subvector depends on those of others, whatever the Hessian
    )
    trains_networks = True  # whether encoders and decoders are trained, not the codebook alone
    mixes_rates = False  # whether a plan gives every matrix bits of its own

    @classmethod
    def offered(cls, config: CompressConfig) -> list[tuple[int, Independent]]:
        """(vector_len, form) that a plan chooses from."""
        lens = VECTOR_LENS if config.vector_len is None else (config.vector_len,)
        return [(d, cls(1 << width)) for d in lens for width in range(1, config.max_index_bits + 1)]

    def has_enough(self, points: int) -> bool:
        """Whether a codebook can be fitted to so many subvectors."""
        return self.codebook_size <= points

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

    def strips(self, rows: int) -> int:
        """Number of parts of the stream that can be read from their start."""
        return 1

    def first_bits(self, rows: Tensor, count: int, per_row: int) -> tuple[Tensor, Tensor, Tensor]:
        """Where the indices of some rows lie in the stream of [count, per_row] indices, in bits.

        Args:
            rows: [m] integers in [0, count).

        Returns:
            [m] each: where the first index begins, how much later every other one begins, and the bit below which
            everything counts as zero.
        """
        return rows * per_row * self.width, torch.full_like(rows, self.width), torch.zeros_like(rows)

    def columns(self, rows: int, device: torch.device, in_strips: bool) -> IndependentColumns:
        """The choice of indices column by column.

        Args:
            in_strips: whether rows compensate for those above them, strip by strip.
        """
        return IndependentColumns(strip_lengths(rows, self.strip_rows if in_strips else rows))

    def table(self, decoded: Tensor) -> Tensor:
        """What each index decodes to, from the decoded codebook [K, d]: the same."""
        return decoded

    def codewords(self, indices: Tensor) -> Tensor:
        """The codeword of each index: the same."""
        return indices

    def fit_codebook(self, points: Tensor, iterations: int, seed: int) -> FittedCodebook:
        """k-means on points [N, d] float32, N >= K."""
        return FittedCodebook(kmeans_codebook(points, self.codebook_size, iterations, seed))

    def predicted_nmse(self, vector_len: int) -> float:
        """Error for a unit-variance Gaussian; see `predicted_nmse`."""
        return predicted_nmse(vector_len, math.log2(self.codebook_size))

    def fit_errors(self, config: CodecConfig) -> int:
        """How many errors the fit of a codec notes: one for each epoch."""
        return config.epochs


IndexForm = Independent | Trellis


def predicted_nmse(vector_len: int, index_bits: float) -> float:
    """Error of a good K-point quantizer in d dimensions, for a unit-variance Gaussian; K = 2^index_bits.

        D(d, K) = 2 pi G_d ((d + 2) / d)^((d + 2) / 2) K^(-2/d),   G_d = Gamma(d/2 + 1)^(2/d) / ((d + 2) pi)

    Source: Zador 1982; Gersho 1979; G_d is the sphere bound.
    """
    d = vector_len
    sphere = math.gamma(d / 2 + 1) ** (2 / d) / ((d + 2) * math.pi)
    distortion = 2 * math.pi * sphere * ((d + 2) / d) ** ((d + 2) / 2) * 2.0 ** (-2 * index_bits / d)
    return min(1.0, distortion)
