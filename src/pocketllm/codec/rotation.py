"""Incoherence: rotate both sides of a matrix by fast orthogonal transforms, so that weights are near Gaussian.

A vector of n = 2^a * m numbers (m odd) is multiplied by random signs, then by the orthogonal matrix
Hadamard(2^a) (x) Hartley(m): any size works, nothing but the seed is stored, and a row costs
n (a + m) additions in the compiled form, two small matrix products here.
Hartley(m)[j, k] = (cos + sin)(2 pi j k / m) / sqrt(m) is symmetric and orthogonal.

Source: incoherence processing of QuIP# (arXiv 2402.04396); Hartley (1942) for the odd factor.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from pocketllm.codec.kernels import reference, select
from pocketllm.errors import ConfigError


def splitmix64(count: int, seed: int) -> np.ndarray:
    """[count] uint64: outputs of splitmix64 for the states seed + (i + 1) * 0x9E3779B97F4A7C15.

    Part of the stored form: a seed gives the same numbers on every machine and with every version.

    Raises:
        ConfigError: a seed outside [0, 2^63).
    """
    if not 0 <= seed < 1 << 63:
        raise ConfigError(f"seed: got {seed}, wanted 0 to 2^63 - 1")
    with np.errstate(over="ignore"):
        z = np.uint64(seed) + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


@functools.lru_cache(maxsize=64)
def signs(size: int, seed: int) -> Tensor:
    """[size] float32 of +1 and -1; the same on every machine for a seed (splitmix64, highest bit).

    Raises:
        ConfigError: a seed outside [0, 2^63).
    """
    high = (splitmix64(size, seed) >> np.uint64(63)).astype(np.float32)
    return torch.from_numpy(1 - 2 * high)


@functools.lru_cache(maxsize=64)
def _signs_on(size: int, seed: int, device: torch.device) -> Tensor:
    """`signs` on a device."""
    return signs(size, seed).to(device)


def rotate(x: Tensor, seed: int) -> Tensor:
    """x [..., n] -> x R^T in float32, with R = mix * diag(signs)."""
    rows = x.float().reshape(-1, x.shape[-1])
    return reference.rotate_rows(rows, _signs_on(x.shape[-1], seed, x.device), inverse=False).view(x.shape)


def unrotate(x: Tensor, seed: int) -> Tensor:
    """Inverse of `rotate`: x [..., n] -> x R."""
    rows = x.float().reshape(-1, x.shape[-1])
    return reference.rotate_rows(rows, _signs_on(x.shape[-1], seed, x.device), inverse=True).view(x.shape)


def rotate_hessian(hessian: Tensor, seed: int) -> Tensor:
    """H [n, n] of inputs x -> R H R^T of the rotated inputs R x."""
    return rotate_matrix(hessian, (seed, seed))


Seeds = tuple[int | None, int | None]
"""Seeds of the rotations of a matrix's columns (length `rows`) and of its rows; None does not rotate a side."""


def rotate_matrix(weight: Tensor, seeds: Seeds) -> Tensor:
    """W [rows, columns] -> R1 W R2^T float32."""
    return select.rotate(weight.float(), _signs_of(weight, seeds), inverse=False)


def unrotate_matrix(weight: Tensor, seeds: Seeds) -> Tensor:
    """Inverse of `rotate_matrix`."""
    return select.rotate(weight.float(), _signs_of(weight, seeds), inverse=True)


def _signs_of(weight: Tensor, seeds: Seeds) -> tuple[Tensor | None, Tensor | None]:
    """The signs of both sides, on the device of the matrix."""
    pairs = zip(weight.shape, seeds, strict=True)
    columns, rows = (None if seed is None else _signs_on(size, seed, weight.device) for size, seed in pairs)
    return columns, rows
