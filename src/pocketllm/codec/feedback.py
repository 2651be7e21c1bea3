"""Choose indices that preserve a layer's outputs and the model's loss instead of the weights.

An error E in the weights of a layer y = W x costs the model

    tr(E^T G E H)        H = E[x x^T] of its inputs, G = E[g g^T] of the loss's gradients at its outputs

to second order, if x and g are assumed independent (Kronecker-factored curvature, arXiv 1503.05671; both sides in
quantization: arXiv 2505.22988). With G = I it is tr(E H E^T), the error of the layer's outputs.

Subvectors are encoded in the order of their columns; the error of each is carried into the columns not yet
encoded, which compensate for it (GPTQ, arXiv 2210.17323, over vectors as in LDLQ of QuIP#, arXiv 2402.04396). With
H^-1 = U^T U, U upper triangular, and J the columns of a subvector:

    index = argmin_c |(w_J - s c) U_JJ^-1|^2         nearest decoded codeword in the conditional metric
    e     = (w_J - s c_index) U_JJ^-1
    w_>J  = w_>J - e U_J,>J                          feedback to the right

Rows compensate for those above them in the same way, strip by strip (a strip is a run of rows). With
G^-1 = V^T V, V upper triangular, S the rows of a strip, and T its target (initially W):

    Z_S  = V_SS^-T (T_S - decoded_S)
    T_>S = T_>S - V_S,>S^T Z_S                       feedback downwards

Since the loss of a strip is tr(Z_S H Z_S^T), it is encoded as above; within a strip, rows only have different
weights. A column of a strip depends only on the same column of the strips above it, so strip k runs 2 k columns
behind the first and all are encoded at once.

Indices are independent, or lie on a trellis: then those of a column of subvectors form one path down the
rows of a strip, and the columns of a strip are one path, too: where a column's path ends, the next one
continues, so the search takes the first rows of the next column into account. Without G, passes of coordinate descent
may follow: they choose each column again with all others fixed, which can only lower the loss. Finally the row
scale is fitted in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pocketllm.codec.feedback_schedule import ColumnFeedback, RowFeedback, Strips
from pocketllm.codec.hessian import HessianFactor
from pocketllm.codec.index_form import ColumnChoice, IndexForm
from pocketllm.codec.subvectors import cut
from pocketllm.config.constants import EVEN_COSTS, GAUSSIAN_KURTOSIS, RELIABLE_STRIP_WEIGHTS


def assign(
    weight: Tensor,
    factor: HessianFactor,
    table: Tensor,
    row_scale: Tensor,
    form: IndexForm,
    *,
    outputs: HessianFactor | None = None,
    row_importance: Tensor | None = None,
    passes: int = 0,
) -> tuple[Tensor, Tensor]:
    """Indices with error feedback, and the row scale fitted to them.

    Args:
        weight: [rows, columns] float32. table: [K, d] float32, the decoded codebook.
        row_scale: [rows] float32, the initial one. form: of the indices.
        outputs: factor of G [rows, rows]; None for G = I.
        row_importance: [rows] float32, what an error in a row costs; None if all rows cost the same. Paths run over
            rows, so on a trellis it shifts precision between them. Not together with `outputs`.
        passes: of coordinate descent; none with `outputs`.

    Returns:
        indices [rows, n] int64, row_scale [rows] float32. For every row (on a trellis: strip of rows; with
        `outputs`: the matrix) the loss is at most that of the nearest codewords with the row scale fitted to them.
    """
    d, rows = table.shape[1], weight.shape[0]
    padded = cut(weight, d).reshape(rows, -1).float()
    scale = row_scale.clamp(min=1e-12)
    importance = torch.ones_like(scale) if row_importance is None else row_importance
    choice: ColumnChoice = form.columns(rows, weight.device, in_strips=outputs is not None)
    problem = _Problem(padded, factor, table, choice, importance, outputs)
    best = problem.scored(problem.feedback(scale))
    if not (choice.nearest_is_slow and problem.is_far_below_nearest(best[2], form.predicted_nmse(d))):
        best = problem.better(best, problem.scored(problem.nearest(scale)))
    for _ in range(passes if outputs is None else 0):
        best = problem.better(best, problem.scored(problem.descend(best[0], best[1])))
    return best[0], best[1]


_Scored = tuple[Tensor, Tensor, Tensor]  # indices [rows, n], row_scale [rows], loss [rows]


@dataclass(frozen=True)
class _Problem:
    """weight: [rows, padded columns]. choice: of the indices of a column. importance: [rows]."""

    weight: Tensor
    factor: HessianFactor
    table: Tensor
    choice: ColumnChoice
    importance: Tensor
    outputs: HessianFactor | None

    @property
    def together(self) -> list[int]:
        """Runs of rows whose loss is one sum."""
        return self.choice.together if self.outputs is None else [len(self.weight)]

    def scored(self, indices: Tensor) -> _Scored:
        """The row scale that minimizes the loss, and the loss, each row's share of it."""
        hessian = self.factor.hessian
        unit = self.table[indices].reshape(self.weight.shape)
        unit[:, self.factor.columns :] = 0  # padding is dropped
        projected = unit @ hessian
        if self.outputs is None:  # s = w H q / q H q
            energy = (projected * unit).sum(dim=1)
            cross = (projected * self.weight).sum(dim=1)
            scale = torch.where(energy > 0, cross / energy.clamp(min=1e-30), torch.zeros_like(energy))
        else:  # (G * Q H Q^T) s = diag(G W H Q^T)
            system = (self.outputs.hessian * (projected @ unit.T)).double()
            system.diagonal().add_(1e-6 * system.diagonal().mean() + 1e-30)
            cross = ((self.outputs.hessian @ self.weight) * projected).sum(dim=1)
            scale = torch.linalg.solve(system, cross.double()).float()
        error = self.weight - scale[:, None] * unit
        cost = error @ hessian
        if self.outputs is not None:
            cost = self.outputs.hessian @ cost
        return indices, scale, (cost * error).sum(dim=1)

    def better(self, one: _Scored, other: _Scored) -> _Scored:
        """The one with the lower loss, for each strip."""
        gain = ((one[2] - other[2]) * self.importance).split(self.together)
        take = torch.cat([part.sum().gt(0).expand(len(part)) for part in gain])
        return (
            torch.where(take[:, None], other[0], one[0]),
            torch.where(take, other[1], one[1]),
            torch.where(take, other[2], one[2]),
        )

    def is_far_below_nearest(self, loss: Tensor, nmse: float) -> bool:
        """Whether the nearest path cannot improve any strip, so that it need not be searched.

        The errors of the nearest path do not depend on H and G. Taken as independent, with variance nmse |w|^2 / C in a
        row w of C weights, they cost on average nmse mean(H_jj) tr(G'), with G'_ik = |w_i| G_ik |w_k|. The relative
        standard deviation of that is sqrt(2) |H|_F / tr(H) |G'|_F / tr(G'), and fitted row scales save a share of about
        |H|_F^2 / tr(H)^2. The margin is a tenth and four standard deviations; two thirds in place of a tenth if errors
        in few rows cost far more than in others, since paths give them precision. The estimate is not used if weights
        are few or far from Gaussian (rotated ones are not), or inputs differ widely in size.

        Args:
            loss: [rows] of `feedback`. nmse: the mean error of the form on a unit Gaussian.
        """
        h, importance = self.factor.hessian[: self.factor.columns, : self.factor.columns], self.importance
        sizes = self.weight.square().sum(dim=1)
        peaked = self.weight.square().square().mean(dim=1) * self.weight.shape[1] ** 2
        kurtosis = float((peaked / sizes.square().clamp(min=1e-30)).mean())
        if not GAUSSIAN_KURTOSIS[0] < kurtosis < GAUSSIAN_KURTOSIS[1] or _spread(h.diagonal()) > EVEN_COSTS:
            return False
        if min(self.together) * self.factor.columns < RELIABLE_STRIP_WEIGHTS:
            return False
        g = importance if self.outputs is None else self.outputs.hessian.diagonal()
        even = 0.9 if _spread(g * sizes) < EVEN_COSTS else 0.33
        share = float(h.square().sum() / h.diagonal().sum().square())
        pairs = zip(
            (importance * loss).split(self.together), (importance * sizes).split(self.together), strict=True
        )
        for found, size in pairs:
            cost, square = size.sum(), size.square().sum()
            if self.outputs is not None:
                weighted = self.outputs.hessian * (size[:, None] * size).sqrt()
                cost, square = weighted.diagonal().sum(), weighted.square().sum()
            deviation = (2 * share * float(square / cost.square())) ** 0.5
            least = (1 - share) * (even - 4 * deviation) * nmse * h.diagonal().mean() * cost
            if not float(found.sum()) < float(least):
                return False
        return True

    def _weights(self, scale: Tensor) -> Tensor:
        """[rows] what a squared error in units of the row scale costs."""
        weights = self.importance * scale.square()
        return weights / weights.mean().clamp(min=1e-30)

    def nearest(self, scale: Tensor) -> Tensor:
        """[rows, n] indices of the least error of the weights alone."""
        return self._coded(scale, None, None)

    def feedback(self, scale: Tensor) -> Tensor:
        """[rows, n] indices by error feedback to the right and, if G is given, downwards."""
        return self._coded(scale, self.factor.upper, self.outputs)

    def _coded(self, scale: Tensor, upper: Tensor | None, outputs: HessianFactor | None) -> Tensor:
        """Column after column, with feedback from the columns before as given by `upper` and `outputs`."""
        (columns, d), device = (self.weight.shape[1], self.table.shape[1]), self.weight.device
        strips = Strips(self.choice.lengths, columns // d, outputs is not None, device)
        ahead = min(self.choice.lookahead, *strips.lengths)
        right, down = ColumnFeedback(strips, self.weight, upper, d), None
        weights, size = strips.pad(self._weights(scale)), strips.pad(scale)[..., None]
        if outputs is not None:
            down = RowFeedback(strips, outputs.upper, d)
            weights = weights * down.diagonal
        tables = self.choice.prepared(self.table @ right.metric)
        found = torch.zeros(*strips.inside.shape, strips.columns, dtype=torch.int64, device=device)
        before = torch.zeros(len(strips.lengths), dtype=torch.int64, device=device)
        for at in strips:
            part, column = at.strips, at.columns
            shift = 0.0 if down is None else down.shift(at)
            points = (right.wanted(at) - shift) / size[part]
            peek = right.wanted(at.next)[:, :ahead]
            peek = (peek - (0.0 if down is None else down.shift(at.next, ahead))) / size[part, :ahead]
            both = torch.cat([points @ right.metric[column], peek @ right.metric[at.next.columns]], dim=1)
            mask = torch.cat([strips.inside[part], at.has_next[:, None].expand(-1, ahead)], dim=1)
            costs = torch.cat([weights[part], weights[part, :ahead]], dim=1)
            chosen = torch.zeros_like(found[part, :, 0])
            chosen[strips.inside[part]] = self.choice.first(
                points=both[mask],
                weights=costs[mask],
                tables=tables,
                which=column,
                lengths=strips.lengths[part],
                before=before[part],
                lookahead=[ahead if more else 0 for more in at.has_next.tolist()],
            )
            found[at.numbers, :, column] = chosen
            before[part] = chosen.gather(1, strips.last[part, None])[:, 0]
            codewords = self.table[chosen] * strips.inside[part][..., None]
            right.feed(at, size[part] * ((points - codewords) @ right.metric[column]))
            if down is not None:
                down.feed(at, right.target(at) - shift - size[part] * codewords)
        return found[strips.inside]

    def descend(self, indices: Tensor, scale: Tensor) -> Tensor:
        """One pass of coordinate descent over the columns; the loss of no strip rises."""
        d, hessian = self.table.shape[1], self.factor.hessian
        scale = torch.where(scale.abs() > 1e-12, scale, torch.full_like(scale, 1e-12))
        weights = self._weights(scale)
        start = torch.zeros(len(self.choice.lengths), dtype=torch.int64, device=scale.device)
        last = torch.tensor(self.choice.lengths, device=scale.device).cumsum(0) - 1
        error = self.weight / scale[:, None] - self.table[indices].reshape(self.weight.shape)
        pull = error @ hessian  # gradient of the loss per column, kept up to date
        indices = indices.clone()
        for j in range(0, self.weight.shape[1], d):
            block, column = slice(j, j + d), j // d
            inner = hessian[block, block]
            root = torch.linalg.cholesky(inner)
            # The loss over this subvector is |(x - c) root|^2 with x its error-free target.
            wanted = self.table[indices[:, column]] + torch.linalg.solve(inner, pull[:, block].T).T
            before = indices[last, column - 1] if column else start
            now = indices[:, column]
            found = self.choice.again(wanted @ root, weights, self.table @ root, before, now)
            pull += (self.table[now] - self.table[found]) @ hessian[block]
            indices[:, column] = found
        return indices


def _spread(values: Tensor) -> float:
    """The largest over the mean."""
    return float(values.max() / values.mean().clamp(min=1e-30))
