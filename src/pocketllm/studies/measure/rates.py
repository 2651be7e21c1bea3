"""Limits at a rate: the bound for Gaussian rows (Shannon 1959), the best scalar quantizer."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pocketllm.codec import centroids

_QUANTILES = 4096


def gaussian_mse(row_squares: Tensor, bits: float) -> float:
    """Least mean square error of independent Gaussian rows at a number of bits per weight.

    Reverse water-filling: a row of mean square s gets max(0, log2(s / level) / 2) bits and keeps the error
    min(s, level), the level such that the bits are used up (Cover and Thomas, section 10.3.3).

    Args:
        row_squares: [rows] mean square of each row, known to the code for nothing.
    """
    squares = row_squares.double()
    low, high = 1e-300, float(squares.max())
    for _ in range(200):
        level = (low * high) ** 0.5
        low, high = (level, high) if gaussian_bits(squares, level) > bits else (low, level)
    return float(squares.clamp(max=high).mean())


def gaussian_bits(row_squares: Tensor, level: float) -> float:
    """Bits per weight at a level of reverse water-filling; at a level below every row, of that error."""
    squares = row_squares.double().clamp(min=1e-300)
    return float((torch.log2(squares / level) / 2).clamp(min=0).mean())


def bits_for_mse(row_squares: Tensor, mse: float) -> float:
    """Inverse of `gaussian_mse`: the rate below which the error is impossible for Gaussian rows."""
    squares = row_squares.double()
    if mse >= float(squares.mean()):
        return 0.0
    low, high = 1e-300, float(squares.max())
    for _ in range(200):
        level = (low * high) ** 0.5
        low, high = (level, high) if float(squares.clamp(max=level).mean()) < mse else (low, level)
    return gaussian_bits(squares, low)


def lloyd_max(values: Tensor, size: int, rounds: int = 25) -> Tensor:
    """[N] -> [K, 1] levels of a scalar quantizer for least mean square error.

    Begins at levels as dense as the cube root of the values' density (Panter and Dite 1951), which k-means
    from random values takes long to find; then Lloyd's rounds.
    """
    ordered = values.reshape(-1).float().sort().values
    places = torch.linspace(0, len(ordered) - 1, min(_QUANTILES, len(ordered))).long()
    grid = ordered[places.to(ordered.device)].double().cpu().numpy()
    dense = np.concatenate([[0.0], np.cumsum(np.diff(grid) ** (2 / 3))])
    levels = np.interp((np.arange(size) + 0.5) / size * dense[-1], dense, grid)
    codebook = torch.from_numpy(levels).float()[:, None].to(values.device)
    for _ in range(rounds):
        edges = (codebook[1:, 0] + codebook[:-1, 0]) / 2
        codebook = centroids(ordered[:, None], torch.bucketize(ordered, edges), codebook)
    return codebook
