"""Weight files in safetensors' format: exact sizes before they exist, and writing tensor by tensor."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

WEIGHTS_NAME = "model.safetensors"
SHARD_BYTES = 5 * 10**9
DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.bool: "BOOL",
}


def tensor_bytes(tensor: Tensor) -> bytes:
    """The tensor's raw little-endian bytes, row-major."""
    found: bytes = _raw(tensor).tobytes()
    return found


def _raw(tensor: Tensor) -> Any:
    """`tensor_bytes` as an array, without a copy where the tensor lies so in memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def checksum(*tensors: Tensor) -> str:
    """CRC-32 of the tensors' bytes one after another, 8 hex digits."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(_raw(tensor), value)
    return f"{value:08x}"


Sizes = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
"""Tensor name -> (dtype, shape), in writing order."""


def _nbytes(sizes: Sizes, name: str) -> int:
    dtype, shape = sizes[name]
    return torch.Size(shape).numel() * dtype.itemsize


def _shards(sizes: Sizes) -> dict[str, list[str]]:
    """File name -> tensor names, at most 5 GB per file."""
    shards: list[list[str]] = [[]]
    used = 0
    for name in sizes:
        nbytes = _nbytes(sizes, name)
        if shards[-1] and used + nbytes > SHARD_BYTES:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += nbytes
    total = len(shards)
    if total == 1:
        return {WEIGHTS_NAME: shards[0]}
    return {f"model-{n + 1:05d}-of-{total:05d}.safetensors": shard for n, shard in enumerate(shards)}


def _header(sizes: Sizes, names: list[str]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        dtype, shape = sizes[name]
        end = offset + _nbytes(sizes, name)
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded


def _index(sizes: Sizes, shards: Mapping[str, list[str]]) -> dict[str, str]:
    """The index file of several shards, as file name -> text."""
    if len(shards) == 1:
        return {}
    body = {
        "metadata": {"total_size": sum(_nbytes(sizes, name) for name in sizes)},
        "weight_map": {name: file for file, names in shards.items() for name in names},
    }
    return {f"{WEIGHTS_NAME}.index.json": json.dumps(body, separators=(",", ":")) + "\n"}


def safetensors_bytes(sizes: Sizes) -> dict[str, int]:
    """File name -> exact bytes that `write_safetensors` will write."""
    shards = _shards(sizes)
    found = {
        file: len(_header(sizes, names)) + sum(_nbytes(sizes, name) for name in names)
        for file, names in shards.items()
    }
    return {**found, **{file: len(text) for file, text in _index(sizes, shards).items()}}


def write_safetensors(folder: Path, sizes: Sizes, tensors: Iterator[Tensor]) -> None:
    """Write tensors one at a time, in shards of at most 5 GB, with the usual index file if there are several.

    safetensors' own writer needs all tensors of a file in memory; this one holds a single tensor.

    Args:
        tensors: in the order of `sizes`.
    """
    shards = _shards(sizes)
    for file_name, names in shards.items():
        with (folder / file_name).open("wb") as stream:
            stream.write(_header(sizes, names))
            for name in names:
                tensor = next(tensors)
                assert (tensor.dtype, tuple(tensor.shape)) == (sizes[name][0], tuple(sizes[name][1])), name
                stream.write(tensor_bytes(tensor))
            stream.flush()
            os.fsync(stream.fileno())
    for file_name, text in _index(sizes, shards).items():
        (folder / file_name).write_text(text, encoding="utf-8")
    assert next(tensors, None) is None
