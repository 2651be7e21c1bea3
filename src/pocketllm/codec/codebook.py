"""The codebook in latent space: initialization, nearest codeword, how well it is used.

Source: arXiv 2511.17637, section "Method"; k-means by Lloyd's algorithm through faiss on a CPU.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pocketllm.codec import compiled
from pocketllm.codec.random import splitmix64

# Distances computed at once on a GPU: 2^26 float32 = 256 MiB.
_CHUNK_DISTANCES = 1 << 26
# faiss takes its fused search only from this many numbers (points * d) on, and is 10 times slower below.
_FUSED_NUMBERS = 1 << 17
_WORTH_PADDING = 1 << 22


def normal_codebook(size: int, vector_len: int, generator: torch.Generator) -> Tensor:
    """The authors' initialization: [K, d] from normal(0, 2 / sqrt(d)) (standard deviation)."""
    return torch.randn(size, vector_len, generator=generator) * (2.0 / vector_len**0.5)


def seeded_codebook(size: int, vector_len: int, seed: int) -> Tensor:
    """[K, d] float16 of independent normal numbers: a codebook for rotated weights that needs no storing.

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
    if points.device.type == "cpu":
        import faiss

        kmeans = faiss.Kmeans(
            points.shape[1],
            size,
            niter=iterations,
            seed=seed & 0x7FFFFFFF,
            min_points_per_centroid=1,
            max_points_per_centroid=1 << 30,
        )
        kmeans.train(np.ascontiguousarray(points.float().numpy()))
        return torch.from_numpy(np.array(kmeans.centroids))
    generator = torch.Generator().manual_seed(seed)
    start = torch.randperm(points.shape[0], generator=generator)[:size].to(points.device)
    codebook = points[start].float()
    for _ in range(iterations):
        codebook = centroids(points, nearest(points, codebook), codebook)
    return codebook


def centroids(points: Tensor, indices: Tensor, codebook: Tensor) -> Tensor:
    """Mean of the points assigned to each codeword; a codeword nobody uses stays where it is.

    Args:
        points: [N, d]; indices: [N] int64; codebook: [K, d].
    """
    sums = torch.zeros_like(codebook, dtype=torch.float64).index_add_(0, indices, points.double())
    counts = torch.bincount(indices, minlength=codebook.shape[0])
    means = (sums / counts.clamp(min=1)[:, None]).to(codebook.dtype)
    return torch.where(counts[:, None] > 0, means, codebook)


class Searcher:
    """Nearest codeword of one codebook [K, d], many times: the table is laid out once.

    On a CPU faiss for many points, the compiled search (where it can be built) for few; chunked torch on a
    GPU. All find the same up to rounding; ties go to the lower index.
    """

    def __init__(self, codebook: Tensor) -> None:
        self.codebook = codebook.detach().float()
        on_cpu = self.codebook.device.type == "cpu"
        self.table = (
            compiled.Table(self.codebook) if on_cpu and compiled.available(codebook.shape[1]) else None
        )

    def nearest(self, points: Tensor) -> Tensor:
        """Index of the nearest codeword in Euclidean distance: [N, d] float -> [N] int64 in [0, K)."""
        points = points.detach().float()
        if self.table is not None and points.numel() < _FUSED_NUMBERS:
            return self.table.nearest(points)
        if points.device.type == "cpu":
            return nearest_faiss(points, self.codebook)
        return nearest_torch(points, self.codebook)


def nearest(points: Tensor, codebook: Tensor) -> Tensor:
    """Indices of the nearest codewords: points [N, d], codebook [K, d] -> [N] int64. Many times: `Searcher`."""
    return Searcher(codebook).nearest(points)


def nearest_faiss(points: Tensor, codebook: Tensor) -> Tensor:
    """The search through faiss on a CPU."""
    import faiss

    count, d = points.shape
    missing = -(-_FUSED_NUMBERS // d) - count
    if missing > 0 and count * codebook.shape[0] >= _WORTH_PADDING:
        points = torch.nn.functional.pad(points, (0, 0, 0, missing))
    _, found = faiss.knn(np.ascontiguousarray(points.numpy()), np.ascontiguousarray(codebook.numpy()), 1)
    return torch.from_numpy(found[:count, 0])


def nearest_torch(points: Tensor, codebook: Tensor) -> Tensor:
    """`nearest` by matrix products in chunks; the path for a GPU, and the check of the other one."""
    half_norms = codebook.square().sum(dim=1) / 2
    rows = max(1, _CHUNK_DISTANCES // codebook.shape[0])
    found = []
    for chunk in points.split(rows):
        # |x - c|^2 / 2 without |x|^2 / 2, which does not change the order.
        distances = torch.addmm(half_norms, chunk, codebook.T, alpha=-1)
        least = distances.amin(dim=1, keepdim=True)
        # argmax of a mask returns the first maximum: the lower index wins a tie on every device.
        found.append((distances == least).to(torch.uint8).argmax(dim=1))
    return torch.cat(found) if found else torch.empty(0, dtype=torch.int64, device=points.device)


def straight_through(z: Tensor, q: Tensor) -> Tensor:
    """Value of q, gradient of z (van den Oord et al., arXiv 1711.00937)."""
    return z + (q - z).detach()


def codebook_utilization(counts: Tensor) -> float:
    """Share of codewords used at least once, from the [K] index counts."""
    return (counts > 0).float().mean().item()


def codebook_perplexity(counts: Tensor) -> float:
    """2^entropy of the index distribution, from the [K] index counts; K when all are used alike."""
    p = counts.double() / counts.sum().clamp(min=1)
    return float(torch.exp2(-(p * torch.log2(p.clamp(min=1e-300))).sum()))
