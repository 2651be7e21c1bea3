"""How the indices of a matrix become bytes: independent, row after row, or overlapping on a trellis."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pocketllm.codec.packing import index_width, pack, packed_bytes, unpack
from pocketllm.codec.trellis import STRIP_ROWS, Trellis, pack_paths, trellis_bytes, unpack_paths


@dataclass(frozen=True)
class IndexForm:
    """How the indices of a matrix are stored.

    codebook_size: K. stride: bits that each index adds on a trellis; None for independent indices.
    strip_rows: about how many rows a path runs down before it goes on in the next column.
    """

    codebook_size: int
    stride: int | None = None
    strip_rows: int = STRIP_ROWS

    @property
    def width(self) -> int:
        """Bits of an index."""
        return index_width(self.codebook_size)

    @property
    def bits(self) -> int:
        """Stored bits of an index."""
        return self.width if self.stride is None else self.stride

    @property
    def trellis(self) -> Trellis | None:
        """The trellis of overlapping indices."""
        return None if self.stride is None else Trellis(self.width, self.stride, self.strip_rows)

    def nbytes(self, rows: int, per_row: int) -> int:
        """Bytes of [rows, per_row] packed indices."""
        if self.trellis is not None:
            return trellis_bytes(rows, per_row, self.trellis)
        return packed_bytes(rows * per_row, self.width)

    def pack(self, indices: Tensor) -> Tensor:
        """[rows, n] integer -> uint8 stream."""
        if self.trellis is not None:
            return pack_paths(indices, self.trellis)
        return pack(indices.reshape(-1), self.width)

    def unpack(self, stream: Tensor, rows: int, per_row: int) -> Tensor:
        """Inverse of `pack`: [rows, per_row] int32.

        Raises:
            FormatError: the stream has another length.
        """
        if self.trellis is not None:
            return unpack_paths(stream, self.trellis, rows, per_row)
        return unpack(stream, self.width, rows * per_row).reshape(rows, per_row)
