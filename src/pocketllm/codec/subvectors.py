"""A parameter as a matrix, and the rows of the matrix as subvectors (paper, section "Method": W -> S)."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from pocketllm.errors import ShapeError


class Folded(Protocol):
    """How a parameter maps to its matrix: its shape, and whether its rows are the matrix's columns."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def transposed(self) -> bool: ...


def fold(parameter: Tensor, transposed: bool) -> Tensor:
    """A parameter as the matrix [rows, columns] that is encoded.

    Args:
        parameter: [rows, columns], or [experts, rows, columns] of fused experts, whose rows are stacked.
        transposed: its rows are the matrix's columns (Conv1D, the experts of some models).
    """
    parameter = parameter.mT if transposed else parameter
    return parameter.reshape(-1, parameter.shape[-1])


def unfold(matrix: Tensor, entry: Folded) -> Tensor:
    """Inverse of `fold`: [rows, columns] -> the parameter in the shape that the model holds."""
    if not entry.transposed:
        return matrix.reshape(entry.shape)
    *experts, columns, rows = entry.shape
    return matrix.reshape(*experts, rows, columns).mT.contiguous()


def subvectors_per_row(columns: int, vector_len: int) -> int:
    """Number of subvectors of a row of `columns` weights; the last one may be padded."""
    return -(-columns // vector_len)


def cut(weight: Tensor, vector_len: int) -> Tensor:
    """Cut each row of `weight` into subvectors of `vector_len`; a ragged row is padded with zeros.

    Args:
        weight: [rows, columns], any floating dtype.
        vector_len: d, weights per index, >= 1.

    Returns:
        [rows, ceil(columns / d), d], same dtype. A view where no padding is needed.

    Raises:
        ShapeError: `weight` is not a matrix.

    Example:
        >>> cut(torch.arange(6.0).reshape(1, 6), 4).shape
        torch.Size([1, 2, 4])
    """
    if weight.ndim != 2:
        raise ShapeError(
            f"cut: got a tensor of shape {tuple(weight.shape)}, wanted a matrix [rows, columns]; "
            "flatten leading dimensions first"
        )
    rows, columns = weight.shape
    count = subvectors_per_row(columns, vector_len)
    padding = count * vector_len - columns
    if padding:
        weight = torch.nn.functional.pad(weight, (0, padding))
    return weight.reshape(rows, count, vector_len)


def join(subvectors: Tensor, columns: int) -> Tensor:
    """Inverse of `cut`: [rows, n, d] -> [rows, columns], dropping the padding.

    Raises:
        ShapeError: the subvectors do not cover exactly a row of `columns` weights.
    """
    if subvectors.ndim != 3 or subvectors.shape[1] != subvectors_per_row(columns, subvectors.shape[2]):
        raise ShapeError(
            f"join: got subvectors of shape {tuple(subvectors.shape)}, wanted "
            f"[rows, n, d] with n = ceil({columns} / d)"
        )
    return subvectors.reshape(subvectors.shape[0], -1)[:, :columns]


def strip_count(rows: int, strip_rows: int) -> int:
    """Number of the strips that `rows` are cut into."""
    return max(1, round(rows / strip_rows))


def strip_lengths(rows: int, strip_rows: int) -> list[int]:
    """Lengths of the strips that `rows` are cut into: equal but for one row, the longer ones first."""
    count = strip_count(rows, strip_rows)
    return [rows // count + (1 if strip < rows % count else 0) for strip in range(count)]
