"""The hashed trellis: a window is hashed to 8 bits, which choose one of 256 entries for each component.

    component 0 of an index:  entries[(low byte + reversed bits of the high byte) mod 256, 0]
    component 1 of an index:  entries[(low byte + high byte) mod 256, 1]

The low byte holds the 8 oldest bits of the window, the high byte the 8 newest. What makes a trellis good is how far
back a window remembers, not how many different values it can take: with windows of 12 bits the error on a Gaussian
source is that of a free table of 4096 entries within 4 percent, while 256 entries of one byte fit into the registers
of a processor. So entries are multiples of 1/32 from -127/32 to 127/32: whatever decodes the codebook, its output is
rounded to those.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from pocketllm.codec.codebook import FittedCodebook
from pocketllm.codec.trellis_form import Trellis, reversed_bits
from pocketllm.config.constants import HASHED_NMSE
from pocketllm.errors import ConfigError, ShapeError

ENTRIES = 256
"""Codewords of a hashed codebook."""
WINDOWS = (9, 16)
"""Least and most bits of a window."""
MOST_COMPONENTS = 2
UNIT = 1 / 32
"""What entries are multiples of. A power of two: the product with a row scale is the same before and after it."""
_LARGEST = 127


@dataclass(frozen=True)
class HashedTrellis(Trellis):
    """Indices on a trellis that look up 256 codewords by a hash, d = 1 or 2, 9 <= width <= 16."""

    rates = tuple(HASHED_NMSE)

    @property
    def codebook_size(self) -> int:
        """K."""
        return ENTRIES

    @property
    def window(self) -> int:
        """Bits of an index."""
        return self.width

    def table(self, decoded: Tensor) -> Tensor:
        """[2^width, d] float32, entries rounded; differentiable in the decoded codebook [256, d]."""
        return hashed_table(decoded, self.width)

    def codewords(self, indices: Tensor) -> Tensor:
        """The codeword that each index uses for component 0."""
        return hashed_index(self.width, 0).to(indices.device)[indices.long()]

    def first_codebook(self, points: Tensor, seed: int) -> Tensor:
        """Quantiles of the points, spread further apart the more bits there are (measured)."""
        return shuffled_quantiles(points.float(), 1 + self.stride / points.shape[1] / 15, seed)

    def fit_codebook(self, points: Tensor, iterations: int, seed: int) -> FittedCodebook:
        """As on any trellis; the codewords are rounded like the entries that they are decoded to at first."""
        fitted = super().fit_codebook(points, iterations, seed)
        return replace(fitted, table=rounded_entries(fitted.table))

    def refitted(self, points: Tensor, indices: Tensor, previous: Tensor) -> Tensor:
        """The best codebook [256, d] for given indices [N] of points [N, d]."""
        return refitted_entries(points, indices, previous, self.width)

    def predicted_nmse(self, vector_len: int) -> float:
        """Error for a unit-variance Gaussian, measured for windows of 12 bits; for others as on any trellis."""
        known = HASHED_NMSE.get((vector_len, self.stride))
        if known is None:
            return super().predicted_nmse(vector_len)
        usual = Trellis(12, self.stride).predicted_nmse(vector_len)
        return known * super().predicted_nmse(vector_len) / usual


@lru_cache(maxsize=32)
def hashed_index(width: int, component: int) -> Tensor:
    """[2^width] int64 in [0, 256): which codeword each window uses for a component. Not to be modified.

    Raises:
        ConfigError: a width outside 9 to 16, or a component that is not 0 or 1.
    """
    if not WINDOWS[0] <= width <= WINDOWS[1]:
        raise ConfigError(f"hashed trellis: got windows of {width} bits, wanted {WINDOWS[0]} to {WINDOWS[1]}")
    if component not in range(MOST_COMPONENTS):
        raise ConfigError(f"hashed trellis: got component {component}, wanted vector_len 1 or 2")
    window, backwards = torch.arange(1 << width), reversed_bits(8)
    low, high = window & 255, window >> (width - 8)
    return (low + (backwards[high] if component == 0 else high)) & 255


def rounded_entries(decoded: Tensor) -> Tensor:
    """Entries as they are used: to the nearest multiple of 1/32 (halves to even) within +-127/32.

    Its gradient is that of the identity.

    Args:
        decoded: [..., 256, d] float32, the decoded codebook.
    """
    found: Tensor = _Rounded.apply(decoded)
    return found


def off_halves(codebook: Tensor) -> Tensor:
    """The codebook in float16, with codewords halfway between two entries moved by 1/512.

    A decoder that is the identity but for the last bit of a float32 would round them up here and down there.
    """
    stored = codebook.half()
    halfway = (stored.float() / UNIT).frac().abs() == 0.5
    return torch.where(halfway, stored + 1 / 512, stored)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, decoded: Tensor) -> Tensor:
        return (decoded / UNIT).round().clamp(-_LARGEST, _LARGEST) * UNIT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def int8_entries(decoded: Tensor) -> Tensor:
    """Decoded codebooks [..., 256, d] -> int8 tables [..., d, 256], one for each component, in units of 1/32."""
    return (rounded_entries(decoded).mT / UNIT).to(torch.int8).contiguous()


def hashed_table(decoded: Tensor, width: int) -> Tensor:
    """The decoded codebook [..., 256, d] -> what each window decodes to, [..., 2^width, d] float32; differentiable.

    Raises:
        ConfigError: see `hashed_index`.
        ShapeError: not [..., 256, 1] or [..., 256, 2].
    """
    if decoded.ndim < 2 or decoded.shape[-2] != ENTRIES or decoded.shape[-1] not in (1, MOST_COMPONENTS):
        raise ShapeError(
            f"hashed trellis: got a codebook {tuple(decoded.shape)}, wanted [256, 1] or [256, 2]"
        )
    columns = rounded_entries(decoded.float()).unbind(-1)
    found = [
        column.index_select(-1, hashed_index(width, n).to(column.device)) for n, column in enumerate(columns)
    ]
    return torch.stack(found, dim=-1)


def refitted_entries(points: Tensor, indices: Tensor, previous: Tensor, width: int) -> Tensor:
    """Best codebook [256, d] for given windows: the mean of the points that look up each entry.

    Args:
        points: [N, d] float32. indices: [N] integer windows. previous: [256, d], kept where nothing looks.
    """
    found = []
    for component, kept in enumerate(previous.unbind(-1)):
        where = hashed_index(width, component).to(indices.device)[indices]
        counts = torch.bincount(where, minlength=ENTRIES)
        sums = torch.zeros(ENTRIES, dtype=torch.float64, device=points.device)
        sums.index_add_(0, where, points[:, component].double())
        found.append(torch.where(counts > 0, (sums / counts.clamp(min=1)).to(kept), kept))
    return torch.stack(found, dim=-1)


def shuffled_quantiles(points: Tensor, spread: float, seed: int) -> Tensor:
    """A first codebook [256, d]: quantiles of the points times `spread`, each component in random order.

    In random order, so that neighbouring states of a trellis differ.
    """
    generator = torch.Generator().manual_seed(seed)
    at = (torch.arange(ENTRIES) + 0.5) / ENTRIES
    found = [
        torch.quantile(column[: 1 << 20].cpu(), at)[torch.randperm(ENTRIES, generator=generator)]
        for column in points.unbind(-1)
    ]
    return spread * torch.stack(found, dim=-1).to(points)
