"""The codebook in latent space: initialization, nearest codeword, usage.

Source: arXiv 2511.17637, section "Method"; k-means by Lloyd's algorithm through faiss on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pocketllm.codec.kernels import select
from pocketllm.codec.kernels.reference import centroids as centroids
from pocketllm.codec.kernels.select import Searcher as Searcher
from pocketllm.codec.rotation import splitmix64


@dataclass(frozen=True)
class FittedCodebook:
    """A codebook, and how well it fits its points.

    table: [K, d] float32. errors: mean square error over the mean square of the points, per iteration.
    utilization: share of the codewords that the points use. The last two are set only if the fit computes them.
    """

    table: Tensor
    errors: tuple[float, ...] = ()
    utilization: float = 1.0


def normal_codebook(size: int, vector_len: int, generator: torch.Generator) -> Tensor:
    """The authors' initialization: [K, d] from normal(0, 2 / sqrt(d)) (standard deviation)."""
    return torch.randn(size, vector_len, generator=generator) * (2.0 / vector_len**0.5)


def seeded_codebook(size: int, vector_len: int, seed: int) -> Tensor:
    """[K, d] float16 of independent normal numbers: a codebook for rotated weights; it need not be stored.

    Component i is the normal quantile of (u + 1/2) / 2^32, with u the upper half of output i of splitmix64.
    """
    high = torch.from_numpy((splitmix64(size * vector_len, seed) >> np.uint64(32)).astype(np.float64))
    return torch.special.ndtri((high + 0.5) / 2.0**32).reshape(size, vector_len).half()


def kmeans_codebook(points: Tensor, size: int, iterations: int, seed: int) -> Tensor:
    """[N, d] -> [K, d] centroids after `iterations` rounds of Lloyd's algorithm.

    Starts from K distinct points drawn with `seed`; an empty cluster takes half of a large one.

    Args:
        points: float tensor with N >= K rows.
    """
    return select.kmeans(points, size, iterations, seed)


def nearest(points: Tensor, codebook: Tensor) -> Tensor:
    """Indices of the nearest codewords: points [N, d], codebook [K, d] -> [N] int64. For repeated use: `Searcher`."""
    return Searcher(codebook).nearest(points)


def straight_through(z: Tensor, q: Tensor) -> Tensor:
    """Value of q, gradient of z (van den Oord et al., arXiv 1711.00937)."""
    return z + (q - z).detach()


def codebook_utilization(counts: Tensor) -> float:
    """Share of codewords used at least once, from the [K] index counts."""
    return (counts > 0).float().mean().item()


def codebook_perplexity(counts: Tensor) -> float:
    """2^entropy of the index distribution, from the [K] index counts; K when all are used equally often."""
    p = counts.double() / counts.sum().clamp(min=1)
    return float(torch.exp2(-(p * torch.log2(p.clamp(min=1e-300))).sum()))
