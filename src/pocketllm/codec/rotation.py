"""Incoherence: rotate both sides of a matrix by fast orthogonal transforms, so that weights are near Gaussian.

A vector of n = 2^a * m numbers (m odd) is multiplied by random signs, then by the orthogonal matrix
Hadamard(2^a) (x) Hartley(m): any size works, nothing but the seed is stored, and a row costs
n (a + m) additions in the compiled form, two small matrix products here.
Hartley(m)[j, k] = (cos + sin)(2 pi j k / m) / sqrt(m) is symmetric and orthogonal.

Source: incoherence processing of QuIP# (arXiv 2402.04396); Hartley (1942) for the odd factor.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch
from torch import Tensor

from pocketllm.codec.kernels import cpu, select
from pocketllm.codec.splitmix import splitmix64


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


@functools.lru_cache(maxsize=64)
def _factors(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Orthogonal and symmetric L [a, a], R [b, b] with L (x) R = Hadamard (x) Hartley, a and b of similar size."""
    power, odd = _split(size)
    left = 1
    while left < power and 2 * left * left <= size:
        left *= 2
    right = torch.kron(_hadamard(power // left), hartley(odd))
    return _hadamard(left).to(device), right.contiguous().to(device)


def _hadamard(size: int) -> Tensor:
    """[size, size] float32 orthogonal, of a power of two."""
    found = torch.ones(1, 1)
    while len(found) < size:
        found = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]]), found)
    return found / math.sqrt(size)


def _mix(x: Tensor) -> Tensor:
    """x [N, n] float32 times Hadamard(2^a) (x) Hartley(m), which is symmetric: its own inverse."""
    left, right = _factors(x.shape[1], x.device)
    a, b, count = len(left), len(right), len(x)
    with torch.autocast(x.device.type, enabled=False):  # bfloat16 is not accurate enough
        x = (x.reshape(-1, b) @ right).view(count, a, b)
        return torch.bmm(left.expand(count, a, a), x).view(count, -1)


def _mix_columns(x: Tensor) -> Tensor:
    """`_mix` of the columns of x [n, N], without transposing it."""
    left, right = _factors(x.shape[0], x.device)
    a, b, count = len(left), len(right), x.shape[1]
    with torch.autocast(x.device.type, enabled=False):
        x = (left @ x.reshape(a, -1)).view(a, b, count)
        return torch.bmm(right.expand(a, b, b), x).view(-1, count)


@functools.lru_cache(maxsize=64)
def _signs_on(size: int, seed: int, device: torch.device) -> Tensor:
    """`signs` on a device."""
    return signs(size, seed).to(device)


def rotate(x: Tensor, seed: int) -> Tensor:
    """x [..., n] -> x R^T in float32, with R = mix * diag(signs)."""
    rows = x.float().reshape(-1, x.shape[-1])
    return _mix(rows * _signs_on(x.shape[-1], seed, x.device)).view(x.shape)


def unrotate(x: Tensor, seed: int) -> Tensor:
    """Inverse of `rotate`: x [..., n] -> x R."""
    rows = x.float().reshape(-1, x.shape[-1])
    return (_mix(rows) * _signs_on(x.shape[-1], seed, x.device)).view(x.shape)


def rotate_hessian(hessian: Tensor, seed: int) -> Tensor:
    """H [n, n] of inputs x -> R H R^T of the rotated inputs R x."""
    return rotate_matrix(hessian, (seed, seed))


Seeds = tuple[int | None, int | None]
"""Seeds of the rotations of a matrix's columns (length `rows`) and of its rows; None does not rotate a side."""


def rotate_matrix(weight: Tensor, seeds: Seeds) -> Tensor:
    """W [rows, columns] -> R1 W R2^T float32."""
    weight = weight.float()
    if seeds != (None, None) and select.decodes(weight):
        return _compiled(weight, seeds, inverse=False)
    if seeds[0] is not None:
        weight = _mix_columns(weight * _signs_on(len(weight), seeds[0], weight.device)[:, None])
    return weight if seeds[1] is None else rotate(weight, seeds[1])


def unrotate_matrix(weight: Tensor, seeds: Seeds) -> Tensor:
    """Inverse of `rotate_matrix`."""
    weight = weight.float()
    if seeds != (None, None) and select.decodes(weight):
        return _compiled(weight, seeds, inverse=True)
    if seeds[1] is not None:
        weight = unrotate(weight, seeds[1])
    if seeds[0] is None:
        return weight
    return _mix_columns(weight) * _signs_on(len(weight), seeds[0], weight.device)[:, None]


def _compiled(weight: Tensor, seeds: Seeds, inverse: bool) -> Tensor:
    """Both sides by the compiled transform, in one copy of the matrix."""
    weight = weight.detach().clone(memory_format=torch.contiguous_format)
    for side, seed in enumerate(seeds):
        if seed is not None:
            size = weight.shape[side]
            values, mixer = signs(size, seed), hartley(_split(size)[1])
            cpu.rotate_(weight, values, mixer, columns=side == 0, inverse=inverse)
    return weight
