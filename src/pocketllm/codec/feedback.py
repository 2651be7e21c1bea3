"""Choose indices for what the layer does to its inputs, not for the weights alone.

A layer y = W x with inputs of Hessian H = E[x x^T] loses tr(E H E^T) when W is off by E. Subvectors are coded
in order of their columns; the error of each is carried into the columns not yet coded, which make up for it
(GPTQ, arXiv 2210.17323, over vectors as in LDLQ of QuIP#, arXiv 2402.04396). With H^-1 = U^T U, U upper
triangular, and J the columns of a subvector:

    index = argmin_c |(w_J - s c) U_JJ^-1|^2         nearest decoded codeword in the conditional metric
    e     = (w_J - s c_index) U_JJ^-1
    w_>J  = w_>J - e U_J,>J                          feedback

Indices are independent, or lie on a trellis: then those of a column of subvectors form one path down the
rows, and the columns of a strip are one path, too. Afterwards passes of coordinate descent choose each column
again with all others fixed, which can only lower the loss, and the row scale is refitted in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pocketllm.codec.codebook import Searcher
from pocketllm.codec.subvectors import cut, subvectors_per_row
from pocketllm.codec.trellis import PathSearch, Trellis, first_state

_MANY = 4096  # weights of a strip of which the mean is sure
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


class _Independent:
    """Chooses every index of a column by itself."""

    def __init__(self, rows: int) -> None:
        self.strips = [1] * rows  # rows that are better or worse together

    def first(self, points: Tensor, table: Tensor, weights: Tensor, before: Tensor | None) -> Tensor:
        """Indices of a column [rows, d], given those of the column before it (None for the first)."""
        return Searcher(table).nearest(points)

    def again(
        self, points: Tensor, table: Tensor, weights: Tensor, before: Tensor | None, now: Tensor
    ) -> Tensor:
        """Better indices than `now`, such that the columns after it can stay as they are."""
        return Searcher(table).nearest(points)


class _OnTrellis:
    """Chooses the indices of a column as one path for each strip of rows."""

    def __init__(self, rows: int, trellis: Trellis, device: torch.device) -> None:
        self.search = PathSearch(trellis, rows, device)
        self.strips = self.search.lengths
        self.last = torch.tensor(self.strips, device=device).cumsum(0) - 1

    def _start(self, before: Tensor | None) -> Tensor:
        return first_state(len(self.strips), self.last.device) if before is None else before[self.last]

    def first(self, points: Tensor, table: Tensor, weights: Tensor, before: Tensor | None) -> Tensor:
        return self.search.search(points, weights, table, self._start(before))

    def again(
        self, points: Tensor, table: Tensor, weights: Tensor, before: Tensor | None, now: Tensor
    ) -> Tensor:
        return self.search.search(points, weights, table, self._start(before), now[self.last])


def assign(
    weight: Tensor,
    factor: HessianFactor,
    table: Tensor,
    row_scale: Tensor,
    passes: int = 1,
    trellis: Trellis | None = None,
    row_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Indices with error feedback, and the row scale that suits them.

    Args:
        weight: [rows, columns] float32. table: [K, d] float32, the decoded codebook.
        row_scale: [rows] float32, to start with. passes: of coordinate descent.
        trellis: of the indices; None for independent ones.
        row_weight: [rows] float32, what an error in a row costs; None for all alike. Paths run over rows, so
            on a trellis it shifts precision between them.

    Returns:
        indices [rows, n] int64, row_scale [rows] float32. For no row (on a trellis: no strip of rows) is the
        loss above that of the nearest codewords with the row scale that suits those.
    """
    d, rows = table.shape[1], weight.shape[0]
    padded = cut(weight, d).reshape(rows, -1).float()
    scale = row_scale.clamp(min=1e-12)
    importance = torch.ones_like(scale) if row_weight is None else row_weight
    chooser = _Independent(rows) if trellis is None else _OnTrellis(rows, trellis, weight.device)
    problem = _Problem(padded, factor, table, chooser, importance)
    best = problem.scored(problem.feedback(scale))
    if not (trellis is not None and problem.is_far_below_nearest(best[2], trellis.stride / d)):
        best = problem.better(best, problem.scored(problem.nearest(scale)))
    for _ in range(passes):
        best = problem.better(best, problem.scored(problem.descend(best[0], best[1])))
    return best[0], best[1]


_Scored = tuple[Tensor, Tensor, Tensor]  # indices [rows, n], row_scale [rows], loss [rows]


@dataclass(frozen=True)
class _Problem:
    """weight: [rows, padded columns]. chooser: of the indices of a column. importance: [rows]."""

    weight: Tensor
    factor: HessianFactor
    table: Tensor
    chooser: _Independent | _OnTrellis
    importance: Tensor

    def scored(self, indices: Tensor) -> _Scored:
        """Closed-form row scale s = w H q / q H q and the loss (w - s q) H (w - s q)."""
        hessian = self.factor.hessian
        unit = self.table[indices].reshape(self.weight.shape)
        unit[:, self.factor.columns :] = 0  # what decodes into the padding is dropped
        projected = unit @ hessian
        energy = (projected * unit).sum(dim=1)
        cross = (projected * self.weight).sum(dim=1)
        scale = torch.where(energy > 0, cross / energy.clamp(min=1e-30), torch.zeros_like(energy))
        error = self.weight - scale[:, None] * unit
        return indices, scale, ((error @ hessian) * error).sum(dim=1)

    def better(self, one: _Scored, other: _Scored) -> _Scored:
        """Strip by strip, the one with the lower loss."""
        gain = ((one[2] - other[2]) * self.importance).split(self.chooser.strips)
        take = torch.cat([part.sum().gt(0).expand(len(part)) for part in gain])
        return (
            torch.where(take[:, None], other[0], one[0]),
            torch.where(take, other[1], one[1]),
            torch.where(take, other[2], one[2]),
        )

    def is_far_below_nearest(self, loss: Tensor, bits: float) -> bool:
        """Whether no strip can come out better with the nearest path, so that it need not be searched.

        The nearest path leaves an error that is blind to H: about mean(H_jj) |e|^2 over a strip's thousands of
        weights, with |e|^2 at least 2^(-2 bits) |w|^2 by Shannon's bound (weights are no harder than Gaussian
        ones by much). Half of that is left as a margin. Where weights are few or inputs very unlike (they are
        not once rotated), the mean says little.
        """
        diagonal = self.factor.hessian.diagonal()[: self.factor.columns]
        mean = diagonal.mean()
        if min(self.chooser.strips) * self.factor.columns < _MANY or float(diagonal.max()) > 8 * float(mean):
            return False
        least = mean * 4.0**-bits * self.weight.square().sum(dim=1)
        pairs = zip(loss.split(self.chooser.strips), least.split(self.chooser.strips), strict=True)
        return all(bool(found.sum() < 0.5 * bound.sum()) for found, bound in pairs)

    def _weights(self, scale: Tensor) -> Tensor:
        """[rows] what a squared error in units of the row scale costs."""
        weights = self.importance * scale.square()
        return weights / weights.mean().clamp(min=1e-30)

    def nearest(self, scale: Tensor) -> Tensor:
        """[rows, n] indices of the least error of the weights alone."""
        d = self.table.shape[1]
        unit = self.weight / scale[:, None]
        if isinstance(self.chooser, _Independent):
            return self.chooser.first(unit.reshape(-1, d), self.table, scale, None).reshape(len(unit), -1)
        weights, found = self._weights(scale), list[Tensor]()
        for points in unit.split(d, dim=1):
            found.append(self.chooser.first(points, self.table, weights, found[-1] if found else None))
        return torch.stack(found, dim=1)

    def feedback(self, scale: Tensor) -> Tensor:
        """[rows, n] indices by error feedback from left to right."""
        (rows, columns), d, upper = self.weight.shape, self.table.shape[1], self.factor.upper
        remaining = self.weight / scale[:, None]
        weights = self._weights(scale)
        found = list[Tensor]()
        group = max(d, _GROUP // d * d)
        inner = torch.linalg.inv(torch.stack([upper[j : j + d, j : j + d] for j in range(0, columns, d)]))
        for begin in range(0, columns, group):
            end = min(begin + group, columns)
            errors = torch.zeros(rows, end - begin, device=remaining.device)
            for j in range(begin, end, d):
                block, metric = slice(j, j + d), inner[j // d]
                points = remaining[:, block] @ metric
                before = found[-1] if found else None
                table = self.table @ metric
                found.append(self.chooser.first(points, table, weights, before))
                error = points - table[found[-1]]
                errors[:, j - begin : j - begin + d] = error
                remaining[:, j + d : end] -= error @ upper[block, j + d : end]
            remaining[:, end:] -= errors @ upper[begin:end, end:]
        return torch.stack(found, dim=1)

    def descend(self, indices: Tensor, scale: Tensor) -> Tensor:
        """One pass of coordinate descent over the columns; the loss of no strip rises."""
        d, hessian = self.table.shape[1], self.factor.hessian
        scale = torch.where(scale.abs() > 1e-12, scale, torch.full_like(scale, 1e-12))
        weights = self._weights(scale)
        error = self.weight / scale[:, None] - self.table[indices].reshape(self.weight.shape)
        pull = error @ hessian  # gradient of the loss per column, kept up to date
        indices = indices.clone()
        for j in range(0, self.weight.shape[1], d):
            block, column = slice(j, j + d), j // d
            inner = hessian[block, block]
            root = torch.linalg.cholesky(inner)
            # The loss over this subvector is |(x - c) root|^2 with x its error-free target.
            wanted = self.table[indices[:, column]] + torch.linalg.solve(inner, pull[:, block].T).T
            before = indices[:, column - 1] if column else None
            now = indices[:, column]
            found = self.chooser.again(wanted @ root, self.table @ root, weights, before, now)
            pull += (self.table[now] - self.table[found]) @ hessian[block]
            indices[:, column] = found
        return indices
