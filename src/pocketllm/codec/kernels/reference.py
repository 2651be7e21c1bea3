"""The hot loops in torch, on any device; every other kernel must agree with them."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pocketllm.codec.subvectors import cut, join

Signs = tuple[Tensor | None, Tensor | None]
_CHUNK_DISTANCES = 1 << 26  # computed at once: 256 MiB of float32


@dataclass(frozen=True)
class PathProblem:
    """One column of some strips; tensors are contiguous and on one device.

    points: [n, d] float32, those of each strip followed by some that are not put out. weights: [n] float32.
    tables: [C, d, 2^width] float32, over bit-reversed states. halves: [C, 2^width], |c|^2 / 2.
    which, after: [strips] int64, the table of a strip's own points, and of those that follow.
    start, stop: [strips] int64, the state before the first point, and the one to end in (-1: any).
    lengths, lookahead: of each strip, how many points are its own, and how many follow.
    width, stride: of the trellis.
    """

    points: Tensor
    weights: Tensor
    tables: Tensor
    halves: Tensor
    which: Tensor
    after: Tensor
    start: Tensor
    stop: Tensor
    lengths: list[int]
    lookahead: list[int]
    width: int
    stride: int

    @property
    def kept(self) -> int:
        """Bits that a state shares with the previous one."""
        return self.width - self.stride


def cheapest_paths(problem: PathProblem) -> Tensor:
    """States [rows] int64 of the cheapest paths; strips of equal length at once."""
    lengths, lookahead, device = problem.lengths, problem.lookahead, problem.points.device
    out = torch.empty(sum(lengths), dtype=torch.int64, device=device)
    sizes = list(zip(lengths, lookahead, strict=True))
    firsts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    skipped = torch.tensor([0, *lookahead]).cumsum(0)[:-1]
    for length, ahead in dict.fromkeys(sizes):
        chosen = torch.tensor([n for n, size in enumerate(sizes) if size == (length, ahead)])
        into = (firsts[chosen][:, None] + torch.arange(length)).to(device)
        rows = ((firsts + skipped)[chosen][:, None] + torch.arange(length + ahead)).to(device)
        out[into] = _equal_strips(problem, rows, chosen.to(device), length)[:, :length]
    return out


def _equal_strips(problem: PathProblem, rows: Tensor, chosen: Tensor, own: int) -> Tensor:
    """States [B, T] of strips of one length.

    Args:
        rows: [B, T] of the problem's points, the first `own` of each strip its own. chosen: [B] strips.
    """
    points, weights = problem.points[rows], problem.weights[rows]
    tables = [(problem.tables[n], problem.halves[n]) for n in (problem.which[chosen], problem.after[chosen])]
    start, stop = problem.start[chosen], problem.stop[chosen]
    kept, choices = problem.kept, 1 << problem.stride
    table, half = tables[0]
    batch, length, d = points.shape
    scaled = points * weights[..., None]
    cost = torch.full((batch, half.shape[1]), torch.inf, device=points.device)
    cost.scatter_(1, start[:, None], 0.0)
    back = torch.empty(length, batch, 1 << kept, dtype=torch.uint8, device=points.device)
    for t in range(length):
        if t == own:
            table, half = tables[1]
        previous = cost.reshape(batch, choices, 1 << kept)
        least = previous.amin(dim=1)
        # The first of equals wins on every device.
        back[t] = (previous == least[:, None]).to(torch.uint8).argmax(dim=1)
        branch = half * weights[:, t, None]
        for i in range(d):
            branch = branch - scaled[:, t, i, None] * table[:, i]
        cost = least.repeat_interleave(choices, dim=1) + branch
        if t % 16 == 15:  # keep magnitudes small
            cost = cost - cost.amin(dim=1, keepdim=True)
    state = torch.where(stop < 0, cost.argmin(dim=1), stop)
    out = torch.empty(batch, length, dtype=torch.int64, device=points.device)
    for t in range(length - 1, -1, -1):
        out[:, t] = state
        group = state >> problem.stride
        state = (back[t].gather(1, group[:, None])[:, 0].long() << kept) | group
    return out


def product(left: Tensor, right: Tensor) -> Tensor:
    """left [..., rows, depth] @ right [..., depth, columns]; batches as a product of contiguous matrices."""
    return left.contiguous() @ right if left.ndim == 3 else left @ right


def gather(table: Tensor, indices: Tensor, scale: Tensor, columns: int) -> Tensor:
    """scale * table[indices], joined to rows: [K, d], [rows, n] integer, [rows] -> [rows, columns] float32."""
    return join(table[indices.long()] * scale[:, None, None], columns)


def scatter(table: Tensor, indices: Tensor, scale: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Transpose of `gather`: gradient [rows, columns] -> gradients of table [K, d] and scale [rows]."""
    pieces, flat = cut(grad, table.shape[1]), indices.long()
    scale_grad = (pieces * table[flat]).sum(dim=(1, 2))
    scaled = (pieces * scale[:, None, None]).reshape(-1, table.shape[1])
    return torch.zeros_like(table).index_add_(0, flat.reshape(-1), scaled), scale_grad


def nearest(points: Tensor, codebook: Tensor) -> Tensor:
    """[N, d], [K, d] float32 -> [N] int64, the nearest codewords, by matrix products in chunks."""
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


def add_square(total: Tensor, x: Tensor) -> None:
    """total [C, C] float32 += x^T x for x [tokens, C] float32 or bfloat16, in place."""
    x = x.float()
    total.addmm_(x.T, x)


def kmeans(points: Tensor, size: int, iterations: int, seed: int) -> Tensor:
    """[N, d] -> [K, d] float32 centroids; a codeword that no point is nearest to stays where it is."""
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


def rotate(weight: Tensor, signs: Signs, inverse: bool) -> Tensor:
    """R1 W R2^T of W [rows, columns] float32, or with `inverse` R1^T W R2; rotation.py has the formula of R.

    Args:
        signs: of the rotation of the columns [rows] and of the rows [columns]; None leaves a side as it is.
    """
    of_columns, of_rows = signs
    if not inverse:
        if of_columns is not None:
            weight = _mix_columns(weight * of_columns[:, None])
        return weight if of_rows is None else rotate_rows(weight, of_rows, inverse=False)
    if of_rows is not None:
        weight = rotate_rows(weight, of_rows, inverse=True)
    return weight if of_columns is None else _mix_columns(weight) * of_columns[:, None]


def rotate_rows(x: Tensor, signs: Tensor, inverse: bool) -> Tensor:
    """x [N, n] float32 times R^T = diag(signs) mix, or with `inverse` times R."""
    return _mix(x) * signs if inverse else _mix(x * signs)


@functools.lru_cache(maxsize=64)
def hartley(size: int) -> Tensor:
    """[size, size] float32 orthogonal and symmetric."""
    position = torch.arange(size, dtype=torch.float64)
    angle = 2 * math.pi * (position[:, None] * position[None, :] % size) / size
    return ((angle.cos() + angle.sin()) / math.sqrt(size)).float()


def power_and_odd(size: int) -> tuple[int, int]:
    """(power of two, odd) whose product is `size`."""
    power = size & -size
    return power, size // power


@functools.lru_cache(maxsize=64)
def _factors(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Orthogonal and symmetric L [a, a], R [b, b] with L (x) R = Hadamard (x) Hartley, a and b of similar size."""
    power, odd = power_and_odd(size)
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
    with torch.autocast(x.device.type, enabled=False):  # bfloat16 would not do
        x = (x.reshape(-1, b) @ right).view(count, a, b)
        return torch.bmm(left.expand(count, a, a), x).view(count, -1)


def _mix_columns(x: Tensor) -> Tensor:
    """`_mix` of the columns of x [n, N], without transposing it."""
    left, right = _factors(x.shape[0], x.device)
    a, b, count = len(left), len(right), x.shape[1]
    with torch.autocast(x.device.type, enabled=False):
        x = (left @ x.reshape(a, -1)).view(a, b, count)
        return torch.bmm(right.expand(a, b, b), x).view(-1, count)
