"""The dtype of matrix products of a running model."""

from __future__ import annotations

import torch
from torch import Tensor


def fast_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 if the machine computes in it at full speed, otherwise float32."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    has = (getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in ("avx512_bf16", "amx_tile"))
    return torch.bfloat16 if any(has) else torch.float32


def autocast(device: torch.device | str) -> torch.autocast:
    """Compute matrix products in `fast_dtype`; sums and everything else in float32."""
    dtype = fast_dtype(device)
    return torch.autocast(torch.device(device).type, dtype, enabled=dtype != torch.float32)


def as_multiplied(x: Tensor) -> Tensor:
    """x in the dtype in which products with it are computed under `autocast`."""
    return x.to(fast_dtype(x.device))
