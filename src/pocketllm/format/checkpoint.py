"""The compressed model on disk. FORMAT.md specifies it; this file writes, describes and verifies it.

A parameter P of the model is stored as `P.indices` (packed) and `P.row_scale`; codebooks and decoders as
`pocketllm.codebooks.I`, `pocketllm.decoders.J.up` and `.down`; everything else under its own name.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pocketllm.errors import ConfigError, FormatError
from pocketllm.files import need_regular, read_object, sha256_file
from pocketllm.format.layout import (
    FORMAT_VERSION as FORMAT_VERSION,
    PARTS,
    READABLE_VERSIONS,
    STORE as STORE,
    Layout as Layout,
)
from pocketllm.format.report import check_report
from pocketllm.format.trust import check_folder, check_sizes, weights_of
from pocketllm.source.model_files import is_plain

REPORT_NAME = "pocketllm.json"
"""The file in a compressed model's folder that holds its report; it identifies such a folder."""
WEIGHTS_NAME = "model.safetensors"
SHARD_BYTES = 5 * 10**9
_DTYPE_NAMES = {
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
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def checksum(*tensors: Tensor) -> str:
    """CRC-32 of the tensors' bytes one after another, 8 hex digits."""
    value = 0
    for tensor in tensors:
        value = zlib.crc32(tensor_bytes(tensor), value)
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
            "dtype": _DTYPE_NAMES[dtype],
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


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def is_compressed(folder: Path) -> bool:
    """Whether a folder says of itself that pocketllm has compressed it."""
    if os.path.lexists(folder / REPORT_NAME):
        return True
    try:
        return bool(read_object(folder / "config.json")["quantization_config"]["quant_method"] == STORE)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def check_dense(folder: Path, name: str, option: str = "") -> None:
    """Check that a model to be used as the dense one is not compressed.

    Args:
        name: of the model, as the user gave it. option: how to name the dense one, for example `with --against`.

    Raises:
        ConfigError: it is compressed; names the model it was made from, if known.
    """
    if not is_compressed(folder):
        return
    try:
        source = f" (it was made from {read_report(folder)['model']})"
    except FormatError:
        source = ""
    with_option = f" {option}" if option else ""
    raise ConfigError(f"{name}: is already compressed; name the dense model{with_option}{source}")


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a compressed model.

    Raises:
        FormatError: not a compressed model, or the report is damaged.
    """
    path = folder / REPORT_NAME
    if not os.path.lexists(path):
        if is_compressed(folder):
            raise FormatError(
                f"{folder}: no {REPORT_NAME} (save_pretrained does not write one): only pocketllm.load and generate "
                "read such a folder; use the folder that pocketllm wrote"
            )
        raise FormatError(f"{folder}: no {REPORT_NAME}; not a model compressed by pocketllm")
    need_regular(path, FormatError)
    try:
        report = read_object(path)
        if report.get("format_version") not in READABLE_VERSIONS:
            raise FormatError(
                f"{path}: format_version is {report.get('format_version')!r}, this version reads 2 and 3; "
                "update pocketllm-codec"
            )
        check_report(report)
        _check_files(report.get("files"))
    except (OSError, ValueError, OverflowError) as error:
        raise FormatError(f"{path}: damaged ({error}); fetch the model again") from error
    return report


def _check_files(files: Any) -> None:
    if not isinstance(files, dict) or not files:
        raise ValueError("no list of files")
    for name, facts in files.items():
        whole = isinstance(facts, dict) and {"bytes", "sha256"} <= facts.keys()
        if not whole or name == REPORT_NAME or not all(map(is_plain, name.split("/"))):
            raise ValueError(f"files: malformed entry {name!r}")


def verify(folder: Path) -> Layout:
    """Check that a compressed model is complete and unaltered.

    Without a report, as in folders written by `save_pretrained`, only the encoded tensors have checksums.

    Raises:
        FormatError: names the file, and the tensor if one is damaged.
    """
    has_report = os.path.lexists(folder / REPORT_NAME) or not is_compressed(folder)
    files = read_report(folder)["files"] if has_report else {}
    check_folder(folder, files.keys(), REPORT_NAME if has_report else None)
    layout, weights = read_layout(folder), weights_of(folder)
    check_sizes(layout, sum(file.stat().st_size for file in weights), folder / "config.json")
    problems = [_altered(folder / name, facts) for name, facts in files.items()]
    _check_tensors(folder, weights, layout)  # first, since it names the tensor
    found = [problem for problem in problems if problem]
    if found:
        raise FormatError(found[0])
    return layout


def _altered(file: Path, facts: Mapping[str, Any]) -> str:
    if not file.is_file():
        return f"{file}: missing; fetch the model again"
    size = file.stat().st_size
    if size != facts["bytes"]:
        return f"{file}: {size} bytes, wanted {facts['bytes']}; truncated or altered, fetch it again"
    if sha256_file(file) != facts["sha256"]:
        return f"{file}: altered (SHA-256 differs from the one in {REPORT_NAME}); fetch it again"
    return ""


def _check_tensors(folder: Path, weights: list[Path], layout: Layout) -> None:
    """Check that every tensor of the layout is stored in its dtype and shape, and unaltered."""
    wanted, places = layout.tensors(), dict[str, tuple[Path, Any]]()
    with ExitStack() as opened:
        for file in weights:
            try:
                handle = opened.enter_context(safe_open(str(file), framework="pt"))
            except (SafetensorError, OSError) as error:
                raise FormatError(
                    f"{file}: not a readable safetensors file ({error}); truncated or altered, fetch it again"
                ) from error
            places.update(dict.fromkeys(handle.keys(), (file, handle)))
        for name, (dtype, shape) in wanted.items():
            if name not in places:
                raise FormatError(f"{folder}: no *.safetensors file contains {name}; fetch the model again")
            file, handle = places[name]
            stored = handle.get_slice(name)
            if (stored.get_dtype(), tuple(stored.get_shape())) != (_DTYPE_NAMES[dtype], shape):
                raise FormatError(
                    f"{file}: {name}: stored as {stored.get_dtype()} {tuple(stored.get_shape())}, wanted "
                    f"{_DTYPE_NAMES[dtype]} {shape}; fetch the file again"
                )
        for prefix, crc32 in layout.checksums().items():
            keys = [f"{prefix}.{part}" for part in PARTS if f"{prefix}.{part}" in wanted]
            if keys and checksum(*(places[key][1].get_tensor(key) for key in keys)) != crc32:
                raise FormatError(
                    f"{places[keys[0]][0]}: {prefix}: altered (CRC-32 differs); fetch the file again"
                )


def read_layout(folder: Path) -> Layout:
    """The layout in a folder's config.json.

    Raises:
        FormatError: missing, not compressed by pocketllm, or malformed.
    """
    path = folder / "config.json"
    if not os.path.lexists(path):
        raise FormatError(f"{folder}: no config.json; not a compressed model")
    need_regular(path, FormatError)
    try:
        quantization = read_object(path).get("quantization_config") or {}
        if not isinstance(quantization, dict):
            raise ValueError("quantization_config is not an object")
    except (OSError, ValueError) as error:
        raise FormatError(f"{path}: damaged ({error}); fetch the model again") from error
    if quantization.get("quant_method") != STORE:
        raise FormatError(f"{path}: not compressed by pocketllm (quant_method is not {STORE!r})")
    body = {k: v for k, v in quantization.items() if k not in ("quant_method", "mode", "producer")}
    return Layout.from_dict(body, str(path))


def file_facts(folder: Path, names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Size and SHA-256 of files, for the report."""
    return {
        name: {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
        for name in sorted(names)
    }
