"""Incoherence: rotate both sides of a matrix by fast orthogonal transforms, so that all weights look alike.

A vector of n = 2^a * m numbers (m odd) is multiplied by random signs, then by the orthogonal matrix
Hadamard(2^a) (x) Hartley(m): any size works, nothing but the seed is stored, and a row costs
n (a + m) additions. Hartley(m)[j, k] = (cos + sin)(2 pi j k / m) / sqrt(m) is symmetric and orthogonal.

Source: incoherence processing of QuIP# (arXiv 2402.04396); Hartley (1942) for the odd factor.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from pocketllm.codec import compiled
from pocketllm.codec.random import splitmix64


@functools.lru_cache(maxsize=64)
def signs(size: int, seed: int) -> Tensor:
    """[size] float32 of +1 and -1; the same on every machine for a seed (splitmix64, highest bit).

    Raises:
        ConfigError: a seed outside [0, 2^63).
    """
    high = (splitmix64(size, seed) >> np.uint64(63)).astype(np.float32)
    return torch.from_numpy(1 - 2 * high)


@functools.lru_cache(maxsize=64)
def hartley(size: int) -> Tensor:
    """[size, size] float32 orthogonal and symmetric."""
    position = torch.arange(size, dtype=torch.float64)
    angle = 2 * math.pi * (position[:, None] * position[None, :] % size) / size
    return ((angle.cos() + angle.sin()) / math.sqrt(size)).float()


def _split(size: int) -> tuple[int, int]:
    """(power of two, odd) whose product is `size`."""
    power = size & -size
    return power, size // power


def _mix(x: Tensor) -> Tensor:
    """Multiply the last dimension by Hadamard(2^a) (x) Hartley(m), which is symmetric: its own inverse."""
    size = x.shape[-1]
    power, odd = _split(size)
    x = x.reshape(-1, power, odd)
    if odd > 1:
        x = x @ hartley(odd).to(x.device)
    half = 1
    while half < power:
        pairs = x.reshape(x.shape[0], power // (2 * half), 2, half, odd)
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        x = torch.stack([low + high, low - high], dim=2)
        half *= 2
    return x.reshape(-1, size) / math.sqrt(power)


def rotate(x: Tensor, seed: int) -> Tensor:
    """x [..., n] -> x R^T in float32, with R = mix * diag(signs)."""
    return _mix(x.float() * signs(x.shape[-1], seed).to(x.device)).reshape(x.shape)


def unrotate(x: Tensor, seed: int) -> Tensor:
    """Inverse of `rotate`: x [..., n] -> x R."""
    return _mix(x.float()).reshape(x.shape) * signs(x.shape[-1], seed).to(x.device)


def rotate_hessian(hessian: Tensor, seed: int) -> Tensor:
    """H [n, n] of inputs x -> R H R^T of the rotated inputs R x."""
    return rotate_matrix(hessian, (seed, seed))


Seeds = tuple[int | None, int | None]
"""Of the rotation of a matrix's columns (length `rows`) and of its rows; None leaves that side alone."""


def rotate_matrix(weight: Tensor, seeds: Seeds) -> Tensor:
    """W [rows, columns] -> R1 W R2^T float32."""
    weight = weight.float()
    if seeds != (None, None) and compiled.decodes(weight):
        return _compiled(weight, seeds, inverse=False)
    if seeds[0] is not None:
        weight = rotate(weight.T, seeds[0]).T
    return weight if seeds[1] is None else rotate(weight, seeds[1])


def unrotate_matrix(weight: Tensor, seeds: Seeds) -> Tensor:
    """Inverse of `rotate_matrix`."""
    weight = weight.float()
    if seeds != (None, None) and compiled.decodes(weight):
        return _compiled(weight, seeds, inverse=True)
    if seeds[1] is not None:
        weight = unrotate(weight, seeds[1])
    return weight if seeds[0] is None else unrotate(weight.T, seeds[0]).T


def _compiled(weight: Tensor, seeds: Seeds, inverse: bool) -> Tensor:
    """Both sides by the compiled transform, in one copy of the matrix."""
    weight = weight.detach().clone(memory_format=torch.contiguous_format)
    for side, seed in enumerate(seeds):
        if seed is not None:
            size = weight.shape[side]
            values, mixer = signs(size, seed), hartley(_split(size)[1])
            compiled.rotate_(weight, values, mixer, columns=side == 0, inverse=inverse)
    return weight
