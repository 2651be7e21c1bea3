"""A matrix that stays packed: the tensors a kernel multiplies with, and what they stand for.

    W = R1^T diag(row_scale) U R2,   U[row] = table[index] of each of its subvectors, cut to `columns`

R1 and R2 are the rotations of rotation.py; either may be missing.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from pocketllm.codec.hashed_table import UNIT, hashed_table
from pocketllm.codec.index_form import HashedTrellis, IndexForm, Trellis, form_for
from pocketllm.codec.kernels import hashed, library
from pocketllm.codec.packing import MAX_WIDTH
from pocketllm.codec.rotation import Seeds, signs
from pocketllm.codec.subvectors import join, subvectors_per_row
from pocketllm.errors import ConfigError, FormatError, ShapeError


class Sizes(NamedTuple):
    """Everything about a packed matrix but its tensors.

    stride: 0 for independent indices. banded: laid out for the kernel of the hashed trellis.
    """

    rows: int
    columns: int
    vector_len: int
    width: int
    stride: int
    strip_rows: int
    banded: bool

    @property
    def form(self) -> IndexForm:
        """How indices are stored, bands aside."""
        return form_for(1 << self.width, self.stride, self.strip_rows)

    @property
    def trellis(self) -> Trellis:
        """The trellis of a banded matrix."""
        return Trellis(self.width, self.stride, self.strip_rows)

    @property
    def per_row(self) -> int:
        """Subvectors in a row."""
        return subvectors_per_row(self.columns, self.vector_len)

    @property
    def nbytes(self) -> int:
        """Bytes of the stream."""
        if self.banded:
            return hashed.band_bytes(self.rows, self.per_row, self.trellis)
        return self.form.nbytes(self.rows, self.per_row)


@functools.lru_cache(maxsize=256)
def kernel_sizes(sizes: Sizes) -> tuple[int, int, int, int, int]:
    """(rows, subvectors in a row, width, stride, strips), in the order in which the kernels take them."""
    return sizes.rows, sizes.per_row, sizes.width, sizes.stride, sizes.form.strips(sizes.rows)


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """Tensors and sizes of a packed matrix [rows, columns].

    Args:
        stream: uint8, packed indices; `hashed.to_bands` of them where `banded`.
        table: [K, d] float32, or the int8 tables [d, 256] of a hashed trellis; the latter where `banded`.
        row_scale: [rows] float32. Holds the scale of int8 tables, too.
        sizes: of the matrix and its indices.
        signs_out, signs_in: [rows] and [columns] float32 of +1 and -1, of R1 and R2; None for no rotation.

    Raises:
        ConfigError: a width outside 1 to 24, or bands without a trellis.
        ShapeError: a table of another shape or dtype.
        FormatError: a stream of another length.
    """

    stream: Tensor
    table: Tensor
    row_scale: Tensor
    sizes: Sizes
    signs_out: Tensor | None = None
    signs_in: Tensor | None = None

    def __post_init__(self) -> None:
        sizes = self.sizes
        if not 1 <= sizes.width <= MAX_WIDTH:
            raise ConfigError(f"packed matrix: got indices of {sizes.width} bits, wanted 1 to {MAX_WIDTH}")
        if sizes.banded and not sizes.stride:
            raise ConfigError("packed matrix: got bands without a trellis; only a hashed trellis has them")
        if sizes.banded and not hashed.fits_bands(sizes.trellis):
            raise ConfigError(
                f"packed matrix: got bands of {sizes.width} bits at stride {sizes.stride}, wanted 9 to 16 bits "
                "and 7 strides + width of at most 64; use the stream without bands"
            )
        entries = sizes.banded or self.is_hashed
        wanted = torch.int8 if entries else torch.float32
        d = self.table.shape[0 if entries else -1]
        if self.table.ndim != 2 or self.table.dtype != wanted or d != sizes.vector_len:
            raise ShapeError(
                f"packed matrix: got a table {tuple(self.table.shape)} of {self.table.dtype}, wanted "
                f"{'[d, 256]' if entries else '[K, d]'} of {wanted} with d = {sizes.vector_len}"
            )
        if self.stream.numel() != sizes.nbytes:
            raise FormatError(
                f"packed matrix: got a stream of {self.stream.numel()} bytes, wanted {sizes.nbytes} "
                f"for {sizes.rows} x {sizes.columns} weights"
            )

    @property
    def is_hashed(self) -> bool:
        """Whether the table holds the entries of a hashed trellis."""
        return self.table.dtype == torch.int8

    def indices(self) -> Tensor:
        """[rows, n] int32."""
        sizes = self.sizes
        return sizes.form.unpack(self.in_stream_order().stream, sizes.rows, sizes.per_row)

    def unit(self) -> Tensor:
        """U [rows, columns] float32, in torch."""
        return join(self.in_stream_order().table[self.indices().long()], self.sizes.columns)

    def indices_of(self, rows: Tensor) -> Tensor:
        """[m, n] int64: those of some rows [m], without unpacking any others."""
        sizes = self.sizes
        if sizes.banded:
            return self.in_stream_order().indices_of(rows)
        first, pitch, floor = (
            part[:, None, None] for part in sizes.form.first_bits(rows, sizes.rows, sizes.per_row)
        )
        bits, columns = (torch.arange(n, device=rows.device) for n in (sizes.width, sizes.per_row))
        at = first + pitch * columns[:, None] + bits
        found = self.stream[(at >> 3).clamp(min=0)].long() >> (at & 7) & 1
        return (torch.where(at >= floor, found, 0) << bits).sum(dim=-1)

    def in_stream_order(self) -> PackedWeight:
        """The same matrix without bands and with a full table, for everything but the hashed kernels."""
        sizes, stream = self.sizes, self.stream
        if not self.is_hashed:
            return self
        if sizes.banded:
            shape, trellis = (sizes.rows, sizes.per_row), sizes.trellis
            stream = hashed.from_bands(stream, trellis, *shape, trellis.nbytes(*shape))
        return PackedWeight(
            stream=stream,
            table=table_of(self.table, sizes.width),
            row_scale=self.row_scale,
            sizes=sizes._replace(banded=False),
            signs_out=self.signs_out,
            signs_in=self.signs_in,
        )

    def rotated(self, seeds: Seeds) -> PackedWeight:
        """The same U between the rotations of `seeds`, in the order of rotation.py: of the columns, of the rows."""
        out, into = (
            None if seed is None else signs(size, seed).to(self.stream.device)
            for size, seed in zip((self.sizes.rows, self.sizes.columns), seeds, strict=True)
        )
        return PackedWeight(self.stream, self.table, self.row_scale, self.sizes, out, into)


def packed_weight(
    stream: Tensor, table: Tensor, row_scale: Tensor, columns: int, form: IndexForm
) -> PackedWeight:
    """A matrix in stream order.

    Args:
        stream: uint8, from `form.pack`. table: [K, d] float32. row_scale: [rows] float32.
    """
    rows, d = row_scale.shape[0], table.shape[1]
    sizes = Sizes(rows, columns, d, form.width, form.stride, form.strip_rows, banded=False)
    return PackedWeight(stream, table, row_scale, sizes)


def form_weight(
    stream: Tensor, form: IndexForm, table: Tensor, row_scale: Tensor, columns: int
) -> PackedWeight:
    """A matrix in any form.

    Args:
        table: the decoded codebook [K, d] float32; of a hashed trellis, `int8_entries` of that.
        stream, row_scale, columns: as of `packed_weight`.
    """
    if isinstance(form, HashedTrellis):
        return hashed_weight(stream, table, row_scale * UNIT, columns, form)
    return packed_weight(stream, table, row_scale, columns, form)


def full_table(table: Tensor, sizes: Sizes) -> Tensor:
    """A table [K, d] with a row for every index of `width` bits: what a damaged stream holds is read, too."""
    missing = (1 << sizes.width) - len(table)
    return (pad(table, (0, 0, 0, missing)) if missing > 0 else table).contiguous()


def table_of(entries: Tensor, width: int) -> Tensor:
    """int8 tables [d, 256] -> the table [2^width, d] float32 that they stand for, in units of an int8."""
    return hashed_table(entries.T.float() * UNIT, width) / UNIT


def hashed_weight(
    stream: Tensor, entries: Tensor, row_scale: Tensor, columns: int, trellis: Trellis
) -> PackedWeight:
    """A matrix on a hashed trellis, laid out for the fastest kernel of this processor or of a GPU.

    Args:
        stream: uint8, from `Trellis.pack`. entries: int8 tables [d, 256].
        row_scale: [rows] float32, times the scale of the tables.
    """
    on_cpu, rows, d = stream.device.type == "cpu", row_scale.shape[0], entries.shape[0]
    if on_cpu and not (library.hashed_runs() and hashed.fits_bands(trellis)):
        return packed_weight(stream, table_of(entries, trellis.width), row_scale, columns, trellis)
    sizes = Sizes(rows, columns, d, trellis.width, trellis.stride, trellis.strip_rows, banded=on_cpu)
    stream = hashed.to_bands(stream, trellis, rows, sizes.per_row) if on_cpu else stream
    return PackedWeight(stream, entries, row_scale, sizes)
