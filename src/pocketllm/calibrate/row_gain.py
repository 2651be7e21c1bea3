"""How much cheaper errors in embedding or head become because a trellis gives precision to the rows that need it.

A path runs down the rows, and what an error in each of them costs is among its weights. Where few rows cost far more
than their neighbours, as frequent tokens do, the path is chosen for these, and their error is well below the nmse of
the matrix. By which factor the loss is lowered is measured on Gaussian numbers with the weights of the rows, at 2 bits
per weight: it hardly depends on the bits.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from pocketllm.codec.hashed_table import HashedTrellis
from pocketllm.codec.subvectors import strip_lengths
from pocketllm.codec.trellis_form import PathSearch

_FORM = HashedTrellis(12, 2)
_FITTED = 1 << 14  # Gaussian numbers for the codebook
_NUMBERS = 1 << 17  # to encode, in at most so many columns of the height of the matrix:
_COLUMNS = 8


def row_gain(costs: Tensor) -> float:
    """Loss of a matrix over the loss of one whose rows have equal errors, with paths chosen for the costs.

    Args:
        costs: [rows] what an error in a row of unit scale costs, up to a factor.
    """
    costs = costs.float().cpu()
    if not float(costs.sum()) > 0:
        return 1.0
    columns = min(_COLUMNS, max(1, _NUMBERS // len(costs)))
    lengths = strip_lengths(len(costs), _FORM.strip_rows) * columns
    points = torch.randn(columns * len(costs), 1, generator=torch.Generator().manual_seed(1))
    table, search = _table(), PathSearch(_FORM.width, _FORM.stride, costs.device)
    start, ordered = search.first_state(len(lengths)), search.ordered(table[None])

    def errors(weights: Tensor) -> Tensor:
        weights, which = weights.repeat(columns), torch.zeros_like(start)
        paths = search.search(points, weights, ordered, which, lengths, start)
        return (points - table[paths]).square().reshape(columns, -1).double().mean(dim=0)

    weighted = errors(costs / costs.mean()) @ costs.double()
    equal = errors(torch.ones_like(costs)).mean() * costs.double().sum()
    return float(weighted / equal)


@lru_cache(maxsize=1)
def _table() -> Tensor:
    """[2^width, 1] what each index decodes to, fitted to Gaussian numbers."""
    points = torch.randn(_FITTED, 1, generator=torch.Generator().manual_seed(0))
    return _FORM.table(_FORM.fit_codebook(points, iterations=3, seed=0).table)
