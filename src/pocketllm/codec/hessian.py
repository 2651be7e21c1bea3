"""Hessians of a layer's inputs and of the gradients at its outputs, rotated and factorized for error feedback."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pocketllm.codec.rotation import rotate_hessian
from pocketllm.codec.subvectors import subvectors_per_row
from pocketllm.errors import WeightError

STACKED_NUMBERS = 1 << 26
"""Numbers of the Hessians that are factorized in one call; each takes about 40 bytes meanwhile."""


@dataclass(frozen=True)
class HessianFactor:
    """What `assign` needs from a Hessian; shared by the matrices that read the same inputs.

    hessian: [C, C] float32, damped and padded to whole subvectors. upper: U with hessian^-1 = U^T U.
    columns: before padding.
    """

    hessian: Tensor
    upper: Tensor
    columns: int


def factorize(hessian: Tensor, vector_len: int, damping: float = 0.01) -> HessianFactor:
    """Damp, pad and factorize a Hessian for `assign`.

    Args:
        hessian: [columns, columns] symmetric, positive semidefinite.
        damping: share of the mean diagonal that is added to the diagonal; doubled until H can be factorized.

    Returns:
        The damped H and its factor.

    Raises:
        WeightError: H holds NaN or Inf.
    """
    return factorize_stack([hessian], vector_len, damping)[0]


def factorize_stack(hessians: list[Tensor], vector_len: int, damping: float = 0.01) -> list[HessianFactor]:
    """`factorize` for Hessians of one size: each step is one call for all of them."""
    columns = hessians[0].shape[0]
    padding = subvectors_per_row(columns, vector_len) * vector_len - columns
    regular, means = zip(*map(_regular, hessians), strict=True)
    stack = regular[0][None] if len(regular) == 1 else torch.stack(regular)
    stack = torch.nn.functional.pad(stack, (0, padding, 0, padding))  # errors there cost nothing
    del regular
    added = torch.tensor([damping * mean for mean in means], dtype=stack.dtype, device=stack.device)
    while True:
        damped = stack.clone()
        damped.diagonal(dim1=1, dim2=2).add_(added[:, None])
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed.any():
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
        if not failed.any():
            made = zip(damped.float(), upper.float(), strict=True)
            return [HessianFactor(h, u, columns) for h, u in made]
        added = torch.where(failed > 0, 2 * added, added)


def triangular_root(hessian: Tensor, damping: float) -> Tensor:
    """R [C, C] float64, upper triangular, with the damped H = R R^T; its inverse is the U of `factorize`.

    For what depends only on diagonal blocks of U, whose inverses are those of R: it takes a tenth of the time.

    Args:
        hessian, damping: as for `factorize`.

    Raises:
        WeightError: H holds NaN or Inf.
    """
    hessian, mean = _regular(hessian)
    while True:
        lower, failed = torch.linalg.cholesky_ex(_damped(hessian, damping * mean).flip(0, 1))
        if not failed:
            return lower.flip(0, 1)
        damping *= 2


def _regular(hessian: Tensor) -> tuple[Tensor, float]:
    """H in float64 and its mean diagonal; the identity if H is zero."""
    if not bool(hessian.isfinite().all()):
        raise WeightError(
            "Hessian: contains NaN or Inf; activations or gradients of the model overflow on this text"
        )
    hessian = hessian.double()
    mean = float(hessian.diagonal().mean())
    if mean > 0:
        return hessian, mean
    return torch.eye(len(hessian), dtype=torch.float64, device=hessian.device), 1.0


def _damped(hessian: Tensor, added: float) -> Tensor:
    damped = hessian.clone()
    damped.diagonal().add_(added)
    return damped


def conditional_diagonal(root: Tensor, block: int) -> Tensor:
    """A Hessian's diagonal after errors in earlier blocks have been compensated: [C].

    Args:
        root: of `triangular_root`. block: size of the blocks; nothing is compensated within a block.
    """
    parts = []
    for begin in range(0, len(root), block):
        parts.append(root[begin : begin + block, begin : begin + block].square().sum(dim=1))
    return torch.cat(parts)


class Hessian:
    """H = E[x x^T] of a layer's inputs, or G of the gradients at its outputs, for `MatrixCodec.encode`.

    It is rotated like the matrix and factorized on demand, once for all matrices that share it.

    Args:
        matrix: [columns, columns] symmetric, positive semidefinite. damping: see `factorize`.
    """

    def __init__(self, matrix: Tensor, damping: float = 0.01) -> None:
        self.matrix, self.damping = matrix, damping
        self._factors: dict[tuple[int | None, int], HessianFactor] = {}

    def factor(self, seed: int | None, vector_len: int) -> HessianFactor:
        """Its factor, rotated with a seed (None: not at all), padded to whole subvectors.

        Raises:
            WeightError: it holds NaN or Inf.
        """
        key = seed, vector_len
        if key not in self._factors:
            self._factors[key] = factorize(self._rotated(seed), vector_len, self.damping)
        return self._factors[key]

    def _rotated(self, seed: int | None) -> Tensor:
        return self.matrix if seed is None else rotate_hessian(self.matrix, seed)

    @staticmethod
    def factorize_together(hessians: Sequence[Hessian], seed: int | None, vector_len: int) -> None:
        """Compute the factors that `factor` will return, those of one size in one call each.

        For GPUs, which small factorizations do not fill; they are the same as one by one, but take more memory.

        Raises:
            WeightError: one holds NaN or Inf.
        """
        sizes = defaultdict[tuple[int, float], list[Hessian]](list)
        for hessian in hessians:
            sizes[len(hessian.matrix), hessian.damping].append(hessian)
        for (columns, damping), alike in sizes.items():
            step = max(1, STACKED_NUMBERS // columns**2)
            for begin in range(0, len(alike), step):
                part = alike[begin : begin + step]
                factors = factorize_stack([h._rotated(seed) for h in part], vector_len, damping)
                for hessian, factor in zip(part, factors, strict=True):
                    hessian._factors[seed, vector_len] = factor


class IdentityHessian(Hessian):
    """H = I, which leaves the error of the weights alone; no rotation changes it, and nothing is factorized."""

    def __init__(self, columns: int, device: torch.device) -> None:
        super().__init__(torch.eye(columns, device=device))

    def factor(self, seed: int | None, vector_len: int) -> HessianFactor:
        """See `Hessian.factor`."""
        columns = len(self.matrix)
        padded = subvectors_per_row(columns, vector_len) * vector_len
        upper = torch.eye(padded, device=self.matrix.device)
        hessian = upper.clone()
        hessian.diagonal()[columns:] = (
            0.01  # errors in the padding cost nothing; not 0, so that it can be inverted
        )
        return HessianFactor(hessian, upper, columns)
