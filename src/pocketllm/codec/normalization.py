"""Reshaped layer normalization (RLN) and the row scale.

RLN is a layer norm whose statistics are taken over the FULL ROW: the subvectors are put back into their
row, normalized, and cut again. A plain layer norm over the d numbers of one subvector is the ablation.
Source: arXiv 2511.17637, section "Method". No affine parameters: the paper counts 768 decoder weights at
d = 8, hidden = 16, and three blocks of two d x 16 matrices are exactly those.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

EPS = 1e-6


def reshaped_layer_norm(x: Tensor, eps: float = EPS) -> Tensor:
    """Normalize [rows, n, d] with mean and variance of each row's n * d numbers (padding included)."""
    mean = x.mean(dim=(-2, -1), keepdim=True)
    variance = (x - mean).square().mean(dim=(-2, -1), keepdim=True)
    return (x - mean) * torch.rsqrt(variance + eps)


def subvector_layer_norm(x: Tensor, eps: float = EPS) -> Tensor:
    """The ablation: normalize [rows, n, d] with the statistics of each subvector's d numbers."""
    return torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps)


def identity(x: Tensor) -> Tensor:
    """No normalization."""
    return x


Norm = Callable[[Tensor], Tensor]
"""[rows, n, d] -> the same shape."""

NORMS: dict[str, Norm] = {
    "rln": reshaped_layer_norm,
    "ln": subvector_layer_norm,
    "none": identity,
}


class TypicalRow:
    """RLN with the statistics of a typical row, so that the result does not depend on the row.

    `record` normalizes like RLN and records, for each call, the mean over rows of each row's mean and variance;
    `replay` applies these to any input, in the same order of calls.
    """

    def __init__(self, eps: float = EPS) -> None:
        self.eps = eps
        self._statistics: list[tuple[Tensor, Tensor]] = []
        self._replayed = 0

    def record(self, x: Tensor) -> Tensor:
        """RLN of full rows [rows, n, d]."""
        mean = x.mean(dim=(-2, -1))
        variance = (x - mean[:, None, None]).square().mean(dim=(-2, -1))
        self._statistics.append((mean.mean(), variance.mean()))
        return reshaped_layer_norm(x, self.eps)

    def replay(self, x: Tensor) -> Tensor:
        """Normalize any shape with the statistics recorded at this call."""
        mean, variance = self._statistics[self._replayed % len(self._statistics)]
        self._replayed += 1
        return (x - mean) * torch.rsqrt(variance + self.eps)


def row_rms(weight: Tensor) -> Tensor:
    """Root mean square of each row, the first `row_scale`: [rows, columns] -> [rows] float32."""
    return weight.float().square().mean(dim=1).sqrt()


def divide_rows(weight: Tensor, scale: Tensor) -> Tensor:
    """Rows divided by their scale, float32; a row whose scale is 0 stays 0."""
    return weight.float() * torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))[:, None]


def best_row_scale(weight: Tensor, unit: Tensor) -> Tensor:
    """Least-squares scale per row: argmin_s |w - s u|^2 = <w, u> / <u, u>.

    Args:
        weight: [rows, columns], the original.
        unit: [rows, columns], the decoded rows before scaling.

    Returns:
        [rows] float32; 0 where the decoded row is 0.
    """
    unit = unit.float()
    energy = unit.square().sum(dim=1)
    projection = (weight.float() * unit).sum(dim=1)
    return torch.where(energy > 0, projection / energy, torch.zeros_like(energy))
