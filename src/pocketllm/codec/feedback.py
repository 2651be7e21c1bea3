"""Choose indices for what the layer does to its inputs, not for the weights alone.

A layer y = W x with inputs of Hessian H = E[x x^T] loses tr(E H E^T) when W is off by E. Subvectors are coded
in order of their columns; the error of each is carried into the columns not yet coded, which make up for it
(GPTQ, arXiv 2210.17323, over vectors as in LDLQ of QuIP#, arXiv 2402.04396). With H^-1 = U^T U, U upper
triangular, and J the columns of a subvector:

    index = argmin_c |(w_J - s c) U_JJ^-1|^2         nearest decoded codeword in the conditional metric
    e     = (w_J - s c_index) U_JJ^-1
    w_>J  = w_>J - e U_J,>J                          feedback

Afterwards passes of coordinate descent choose each index again with all others fixed, which can only lower
the loss, and the row scale is refitted in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pocketllm.codec.codebook import Searcher
from pocketllm.codec.subvectors import cut, subvectors_per_row

_GROUP = 128  # columns whose feedback is applied to the rest of the row at once


@dataclass(frozen=True)
class HessianFactor:
    """What assignment needs of a Hessian, shared by the matrices that read the same inputs.

    hessian: [C, C] float32, damped and padded to whole subvectors. upper: U with hessian^-1 = U^T U.
    columns: before padding.
    """

    hessian: Tensor
    upper: Tensor
    columns: int


def factorize(hessian: Tensor, vector_len: int, damping: float = 0.01) -> HessianFactor:
    """Damp, pad and factorize H.

    Args:
        hessian: [columns, columns] symmetric, positive semidefinite.
        damping: share of the mean diagonal that is added to the diagonal; doubled until H can be factorized.
    """
    columns = hessian.shape[0]
    padding = subvectors_per_row(columns, vector_len) * vector_len - columns
    hessian = hessian.double()
    mean = float(hessian.diagonal().mean())
    if not mean > 0:
        hessian, mean = torch.eye(columns, dtype=torch.float64, device=hessian.device), 1.0
    hessian = torch.nn.functional.pad(hessian, (0, padding, 0, padding))  # errors there cost nothing
    while True:
        damped = hessian.clone()
        damped.diagonal().add_(damping * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed:
            return HessianFactor(damped.float(), upper.float(), columns)
        damping *= 2


def assign(
    weight: Tensor,
    factor: HessianFactor,
    table: Tensor,
    row_scale: Tensor,
    passes: int = 1,
) -> tuple[Tensor, Tensor]:
    """Indices with error feedback, and the row scale that suits them.

    Args:
        weight: [rows, columns] float32. table: [K, d] float32, the decoded codebook.
        row_scale: [rows] float32, to start with. passes: of coordinate descent.

    Returns:
        indices [rows, n] int64, row_scale [rows] float32. For no row is the loss above that of the nearest
        codewords with the row scale that suits those.
    """
    d = table.shape[1]
    padded = cut(weight, d).reshape(weight.shape[0], -1).float()
    scale = row_scale.clamp(min=1e-12)[:, None]
    plain = Searcher(table).nearest((padded / scale).reshape(-1, d)).reshape(weight.shape[0], -1)
    best = _scored(padded, factor, table, plain)
    indices = _feedback(padded, factor, table, scale)
    best = _better(best, _scored(padded, factor, table, indices))
    for _ in range(passes):
        indices = _descend(padded, factor, table, best[0], best[1][:, None])
        best = _better(best, _scored(padded, factor, table, indices))
    return best[0], best[1]


_Scored = tuple[Tensor, Tensor, Tensor]  # indices [rows, n], row_scale [rows], loss [rows]


def _scored(weight: Tensor, factor: HessianFactor, table: Tensor, indices: Tensor) -> _Scored:
    """Closed-form row scale s = w H q / q H q and the loss (w - s q) H (w - s q)."""
    unit = table[indices].reshape(weight.shape)
    unit[:, factor.columns :] = 0  # what decodes into the padding is dropped
    projected = unit @ factor.hessian
    energy = (projected * unit).sum(dim=1)
    cross = (projected * weight).sum(dim=1)
    scale = torch.where(energy > 0, cross / energy.clamp(min=1e-30), torch.zeros_like(energy))
    error = weight - scale[:, None] * unit
    return indices, scale, ((error @ factor.hessian) * error).sum(dim=1)


def _better(one: _Scored, other: _Scored) -> _Scored:
    """Row by row, the one with the lower loss."""
    take = other[2] < one[2]
    return (
        torch.where(take[:, None], other[0], one[0]),
        torch.where(take, other[1], one[1]),
        torch.where(take, other[2], one[2]),
    )


def _feedback(weight: Tensor, factor: HessianFactor, table: Tensor, scale: Tensor) -> Tensor:
    """[rows, n] indices by error feedback from left to right."""
    d, columns = table.shape[1], weight.shape[1]
    remaining = weight / scale
    indices = torch.empty(weight.shape[0], columns // d, dtype=torch.int64, device=weight.device)
    group = max(d, _GROUP // d * d)
    for begin in range(0, columns, group):
        end = min(begin + group, columns)
        errors = torch.zeros(weight.shape[0], end - begin, device=weight.device)
        for j in range(begin, end, d):
            block = slice(j, j + d)
            inner = torch.linalg.inv(factor.upper[block, block])
            found = Searcher(table @ inner).nearest(remaining[:, block] @ inner)
            indices[:, j // d] = found
            error = (remaining[:, block] - table[found]) @ inner
            errors[:, j - begin : j - begin + d] = error
            remaining[:, j + d : end] -= error @ factor.upper[block, j + d : end]
        remaining[:, end:] -= errors @ factor.upper[begin:end, end:]
    return indices


def _descend(weight: Tensor, factor: HessianFactor, table: Tensor, indices: Tensor, scale: Tensor) -> Tensor:
    """One pass of coordinate descent over the indices; the loss of no row rises."""
    d = table.shape[1]
    scale = torch.where(scale.abs() > 1e-12, scale, torch.full_like(scale, 1e-12))
    target = weight / scale
    error = target - table[indices].reshape(weight.shape)
    pull = error @ factor.hessian  # gradient of the loss per column, kept up to date
    indices = indices.clone()
    for j in range(0, weight.shape[1], d):
        block = slice(j, j + d)
        inner = factor.hessian[block, block]
        root = torch.linalg.cholesky(inner)
        # The loss over this subvector is |(x - c) root|^2 with x its error-free target.
        wanted = table[indices[:, j // d]] + torch.linalg.solve(inner, pull[:, block].T).T
        found = Searcher(table @ root).nearest(wanted @ root)
        change = table[indices[:, j // d]] - table[found]
        indices[:, j // d] = found
        pull += change @ factor.hessian[block]
    return indices
