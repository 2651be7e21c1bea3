"""The CPU kernels of the hashed trellis as functions of tensors: hashed_rows.cpp and, for many rows of x,
hashed_many.cpp.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from pocketllm.codec.kernels import library
from pocketllm.codec.kernels.packed_weight import PackedWeight, Sizes, kernel_sizes
from pocketllm.codec.kernels.reference import hartley

BANDED_ROWS = 64  # of x: up to here they are multiplied as integers, beyond a decoded tile is worth its time
_ADDRESS, _NUMBER = ctypes.c_void_p, ctypes.c_int64


class PreparedBands:
    """A banded weight as the kernels take it at once: addresses and sizes (`Matrix` of hashed_layout.h).

    Args:
        bands, entries, row_scale, signs_out, signs_in: as of a `PackedWeight`, on the CPU.
        sizes: banded.
    """

    few_rows = BANDED_ROWS

    def __init__(
        self,
        bands: Tensor,
        entries: Tensor,
        row_scale: Tensor,
        signs_out: Tensor | None,
        signs_in: Tensor | None,
        sizes: Sizes,
    ) -> None:
        self.rows, self.columns = sizes.rows, sizes.columns
        into, out = (
            (None, None) if signs is None else (signs.contiguous(), hartley(size // (size & -size)))
            for size, signs in ((sizes.columns, signs_in), (sizes.rows, signs_out))
        )
        self.kept = (bands.contiguous(), entries.contiguous(), row_scale.contiguous(), *into, *out)
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in self.kept]
        rows, *others = kernel_sizes(sizes)
        values = [*addresses, sizes.vector_len, sizes.columns, rows, *others]
        self.matrix = (ctypes.c_int64 * len(values))(*values)
        self.address = ctypes.addressof(self.matrix)
        loaded = library.library("packed")
        assert loaded is not None
        self.run: Any = loaded.hashed_linear  # called directly, since it is called for every layer and token
        self.run.argtypes = [_ADDRESS, _ADDRESS, _NUMBER, _NUMBER, _ADDRESS, _ADDRESS, _NUMBER]

    @classmethod
    def of(cls, weight: PackedWeight) -> PreparedBands:
        """That of a banded weight."""
        return cls(
            weight.stream, weight.table, weight.row_scale, weight.signs_out, weight.signs_in, weight.sizes
        )

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [..., columns] -> x W^T + bias [..., rows], for few rows of x, float32 or bfloat16."""
        dtype, x = x.dtype, x.contiguous()
        out = torch.empty(*x.shape[:-1], self.rows, dtype=dtype)
        if bias is not None:
            bias = bias.to(dtype).contiguous()
        half, count = dtype == torch.bfloat16, x.numel() // self.columns
        added = None if bias is None else bias.data_ptr()
        self.run(self.address, x.data_ptr(), half, count, added, out.data_ptr(), torch.get_num_threads())
        return out

    def multiply_many(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x [T, columns] -> x W^T + bias [T, rows], all bfloat16, with entries and rotated x as 8-bit integers."""
        x, out = x.contiguous(), torch.empty(len(x), self.rows, dtype=x.dtype)
        bias = None if bias is None else bias.to(x.dtype).contiguous()
        library.call("packed", "hashed_many", self.address, x, len(x), bias, out, torch.get_num_threads())
        return out

    def look_up(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows [m] int64 of W -> [m, columns] float32 or bfloat16.

        Raises:
            IndexError: a row outside of the matrix.
        """
        rows, half, threads = rows.contiguous(), int(dtype == torch.bfloat16), torch.get_num_threads()
        out = torch.empty(len(rows), self.columns, dtype=dtype)
        if library.call("packed", "hashed_look_up", self.address, rows, len(rows), half, out, threads):
            raise IndexError(f"index out of range: wanted rows in [0, {self.rows})")
        return out

    def decode(self, begin: int, end: int, out: Tensor) -> None:
        """Rows [begin, end) of U, in units of an entry, into the first rows of `out`: float32 or bfloat16."""
        size, threads = out.element_size(), torch.get_num_threads()
        library.call("packed", "hashed_decode", self.address, begin, end, size, out, threads)
