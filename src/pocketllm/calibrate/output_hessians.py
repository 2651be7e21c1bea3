"""Hessians G of the outputs of a block's layers on disk, between measuring and encoding.

G is kept in float16 where that is the smaller form. For layers with many outputs the gradients that it is the sum of
are smaller: they are kept in 8 bits (`window_sums.in_8_bits`), and summed up again when the block is encoded.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from pocketllm.calibrate.autocast import as_multiplied
from pocketllm.calibrate.input_hessians import regularized_hessian
from pocketllm.codec.kernels.select import add_square
from pocketllm.format.kept import read_kept

_CODES, _SCALES = "codes|", "scales|"
_CHUNK = 1024  # gradients that are summed up at once


def least_rows_in_8_bits(tokens: int) -> int:
    """Rows from which on the gradients of so many tokens take less space than G."""
    return tokens // 2 + 1


def scaled_hessian(total: Tensor, tokens: int) -> Tensor:
    """G [rows, rows] with a mean diagonal of 1, from the sum of g g^T over `tokens` gradients."""
    hessian = regularized_hessian(total, tokens)
    mean = hessian.diagonal().mean()
    hessian /= torch.where(mean > 0, mean, 1.0)  # a router of one normalized expert has no gradient
    return hessian


def as_kept(name: str, hessian: Tensor, gradients: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """The tensors that are kept of the Hessian of a matrix, on the CPU.

    Args:
        hessian: scaled. gradients: in 8 bits; empty to keep the Hessian.
    """
    if not gradients:
        return {name: hessian.half().cpu()}
    codes, scales = (torch.cat(parts) for parts in zip(*gradients, strict=True))
    return {_CODES + name: codes, _SCALES + name: scales}


def output_hessians(folder: Path | None, path: str, device: str, names: Collection[str]) -> dict[str, Tensor]:
    """Hessians [rows, rows] float32 of the outputs of some matrices of a block, scaled, as `measure` has kept them.

    Args:
        folder: that of `measure`; None for no Hessians. path: of the block. names: of the matrices.
    """
    if folder is None:
        return {}
    tensors, facts = read_kept(folder / f"{path}.safetensors")
    found = {}
    for name in names:
        if name in tensors:
            found[name] = tensors[name].to(device).float()
        elif _CODES + name in tensors:
            total = _sum(tensors, name, device)
            found[name] = scaled_hessian(total, facts["tokens"])
    return found


def _sum(tensors: Mapping[str, Tensor], name: str, device: str) -> Tensor:
    """The sum of g g^T over gradients in 8 bits."""
    codes, scales = tensors[_CODES + name], tensors[_SCALES + name]
    total = torch.zeros(codes.shape[1], codes.shape[1], device=device)
    for part, scale in zip(codes.split(_CHUNK), scales.split(_CHUNK), strict=True):
        add_square(total, as_multiplied(part.to(device).float() * scale.to(device)[:, None]))
    return total
