"""Values of a checkpoint that no model can have."""

from __future__ import annotations

import torch
from torch import Tensor

from pocketllm.errors import WeightError

_LARGEST = 1e15  # squares and their sums stay finite in float32


def check_values(where: str, tensor: Tensor) -> None:
    """Check the values of a floating-point tensor.

    Args:
        where: its name and file, for the error.

    Raises:
        WeightError: NaN or Inf; or absurdly large ones in a matrix.
    """
    low, high = torch.aminmax(tensor) if tensor.numel() else (torch.zeros(1), torch.zeros(1))
    finite = bool(torch.isfinite(low) and torch.isfinite(high))
    if finite and (tensor.ndim < 2 or max(-float(low), float(high)) <= _LARGEST):
        return
    bad = tensor.abs() > _LARGEST if finite else ~torch.isfinite(tensor)
    what = f"beyond {_LARGEST:g}" if finite else "NaN or Inf"
    raise WeightError(
        f"{where}: {int(bad.sum())} of {tensor.numel()} values are {what}; "
        "the checkpoint is damaged, fetch it again"
    )
