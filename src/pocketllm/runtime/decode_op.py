"""Decoding as a torch operator, which `torch.export` can include in a program.

The program then holds the packed tensors, and needs pocketllm where it runs.
"""

import json
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pocketllm.format.layout import CodebookEntry, DecoderEntry, Layout
from pocketllm.runtime.packed_tensors import PackedMatrix, Store

_NAME = "matrix"


def decode(matrix: PackedMatrix) -> Tensor:
    """The decoded matrix, computed by the operator."""
    store, entry = matrix._store[0], matrix.entry
    codebook, decoder = store.codebooks[entry.codebook], store.decoders[entry.decoder]
    assert isinstance(codebook.entry, CodebookEntry) and isinstance(decoder.entry, DecoderEntry)
    layout = Layout({_NAME: replace(entry, codebook=0, decoder=0)}, (codebook.entry,), (decoder.entry,))
    found: Tensor = _decode(
        matrix.indices,
        matrix._buffers.get("row_scale"),
        codebook._buffers.get("weight"),
        decoder.up,
        decoder.down,
        json.dumps(layout.to_dict()),
        matrix.float_dtype,
    )
    return found


@torch.library.custom_op("pocketllm::decode", mutates_args=())
def _decode(
    indices: Tensor,
    row_scale: Tensor | None,
    codebook: Tensor | None,
    up: Tensor,
    down: Tensor,
    layout: str,
    dtype: torch.dtype,
) -> Tensor:
    """Decode a matrix that a layout of one matrix describes."""
    described = Layout.from_dict(json.loads(layout))
    store = Store(described)
    matrix = PackedMatrix(described.matrices[_NAME], store, dtype)
    for module, name, value in (
        (matrix, "indices", indices),
        (matrix, "row_scale", row_scale),
        (store.codebooks[0], "weight", codebook),
        (store.decoders[0], "up", up),
        (store.decoders[0], "down", down),
    ):
        if value is not None:
            module._buffers[name] = value
    decoded: Tensor = matrix()
    return decoded


@_decode.register_fake
def _(indices: Tensor, *others: Any) -> Tensor:
    layout, dtype = others[-2:]
    shape = Layout.from_dict(json.loads(layout)).matrices[_NAME].shape
    return torch.empty(shape, dtype=dtype, device=indices.device)
