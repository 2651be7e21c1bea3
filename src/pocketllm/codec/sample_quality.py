"""How well codecs reconstruct the rows that they are fitted to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pocketllm.codec.codebook import codebook_utilization
from pocketllm.codec.matrix_codec import MatrixCodec


@torch.no_grad()
def _reconstruct(codec: MatrixCodec, block: Tensor) -> tuple[Tensor, Tensor]:
    """[rows, n, d] -> (the same encoded and decoded, [rows * n] indices), as `encode` chooses them."""
    indices = codec.choose(block)
    table = codec.decoded_codebook() if codec.is_lookup else None
    return codec.decode_unit(indices, table), indices.reshape(-1)


def nmse(codecs: Mapping[str, MatrixCodec], rows: Mapping[str, list[Tensor]]) -> dict[str, float]:
    """nmse of the rows per key; rows: [rows, n, d] blocks, of unit scale."""
    result = {}
    for key, blocks in rows.items():
        error = sum(float((_reconstruct(codecs[key], b)[0] - b).square().sum()) for b in blocks)
        result[key] = error / max(_energy(blocks), 1e-30)
    return result


def _energy(blocks: list[Tensor]) -> float:
    return sum(float(b.square().sum()) for b in blocks)


def pooled(errors: Mapping[str, float], rows: Mapping[str, list[Tensor]]) -> float:
    """nmse of all rows together, from those per key."""
    energy = {key: _energy(blocks) for key, blocks in rows.items()}
    return sum(errors[key] * energy[key] for key in rows) / max(sum(energy.values()), 1e-30)


def utilization(codecs: Mapping[str, MatrixCodec], rows: Mapping[str, list[Tensor]]) -> float:
    """Share of the shared codebook's codewords that the sample uses."""
    counts = torch.zeros(next(iter(codecs.values())).codebook.shape[0], dtype=torch.int64)
    for key, blocks in rows.items():
        for block in blocks:
            counts += torch.bincount(_reconstruct(codecs[key], block)[1].cpu(), minlength=len(counts))
    return codebook_utilization(counts)
