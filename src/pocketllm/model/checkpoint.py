"""The compressed model on disk. FORMAT.md specifies it; this file writes, describes and verifies it.

A parameter P of the model is stored as `P.indices` (packed) and `P.row_scale`; codebooks and decoders as
`pocketllm.codebooks.I`, `pocketllm.decoders.J.up` and `.down`; everything else under its own name.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pocketllm.config import CodecConfig
from pocketllm.errors import ConfigError, FormatError

FORMAT_VERSION = 1
REPORT_NAME = "pocketllm.json"
WEIGHTS_NAME = "model.safetensors"
SHARD_BYTES = 5 * 10**9
STORE = "pocketllm"
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.uint8: "U8",
}


@dataclass(frozen=True)
class MatrixEntry:
    """How one parameter is stored.

    shape: as the model holds it. transposed: stored rows are the parameter's columns (Conv1D).
    codebook, decoder: numbers in the store. stride: bits that each index adds on a trellis, 0 for independent
    indices. rotation: seeds of the rotations of its columns (each `rows`
    long) and of its rows, None where that side is not rotated. crc32: of indices then row_scale, in hex.
    """

    shape: tuple[int, ...]
    transposed: bool
    codebook: int
    decoder: int
    stride: int
    rotation: tuple[int | None, int | None]
    crc32: str

    @property
    def rows(self) -> int:
        """Rows of the stored matrix."""
        if self.transposed:
            return self.shape[1]
        rows = 1
        for size in self.shape[:-1]:
            rows *= size
        return rows

    @property
    def columns(self) -> int:
        """Columns of the stored matrix."""
        return self.shape[0] if self.transposed else self.shape[-1]


@dataclass(frozen=True)
class CodebookEntry:
    """Size of a codebook [size, vector_len], the CRC-32 of its bytes, and the seed it is drawn from.

    seed: None for a codebook that is stored; one that is drawn is not.
    """

    size: int
    vector_len: int
    seed: int | None
    crc32: str


@dataclass(frozen=True)
class DecoderEntry:
    """Settings of a decoder and the CRC-32 of `up` then `down`."""

    codec: CodecConfig
    crc32: str


@dataclass(frozen=True)
class Layout:
    """Everything about the stored form that is not a tensor: the body of `quantization_config`."""

    matrices: dict[str, MatrixEntry]
    codebooks: tuple[CodebookEntry, ...]
    decoders: tuple[DecoderEntry, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "format_version": FORMAT_VERSION,
            "matrices": {
                name: [
                    *(list(e.shape), e.transposed, e.codebook, e.decoder),
                    *(e.stride, list(e.rotation), e.crc32),
                ]
                for name, e in self.matrices.items()
            },
            "codebooks": [[e.size, e.vector_len, e.seed, e.crc32] for e in self.codebooks],
            "decoders": [
                {
                    "vector_len": e.codec.vector_len,
                    "hidden": e.codec.hidden,
                    "depth": e.codec.depth,
                    "form": e.codec.decoder,
                    "norm": e.codec.norm,
                    "row_scale": e.codec.row_scale,
                    "crc32": e.crc32,
                }
                for e in self.decoders
            ],
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config.json") -> Layout:
        """Inverse of `to_dict`.

        Raises:
            FormatError: unknown version or key, or a malformed entry.
        """
        version = values.get("format_version")
        if version != FORMAT_VERSION:
            raise FormatError(
                f"{where}: format_version is {version!r}, this version reads {FORMAT_VERSION}; "
                "update pocketllm-codec"
            )
        known = {"format_version", "matrices", "codebooks", "decoders"}
        unknown = sorted(set(values) - known)
        if unknown:
            raise FormatError(f"{where}: unknown key {unknown[0]!r} in quantization_config")
        try:
            matrices = {}
            for name, stored in values["matrices"].items():
                shape, transposed, codebook, decoder, stride, (columns, rows), crc32 = stored
                matrices[name] = MatrixEntry(
                    tuple(shape), bool(transposed), codebook, decoder, stride, (columns, rows), crc32
                )
            codebooks = tuple(CodebookEntry(*entry) for entry in values["codebooks"])
            decoders = tuple(_decoder_entry(entry) for entry in values["decoders"])
        except (KeyError, TypeError, ValueError, AttributeError, ConfigError) as error:
            raise FormatError(f"{where}: malformed quantization_config ({error!r})") from error
        for name, entry in matrices.items():
            if not (0 <= entry.codebook < len(codebooks) and 0 <= entry.decoder < len(decoders)):
                raise FormatError(f"{where}: {name} names a codebook or decoder that does not exist")
        return cls(matrices, codebooks, decoders)


def _decoder_entry(entry: Mapping[str, Any]) -> DecoderEntry:
    unknown = sorted(set(entry) - {"vector_len", "hidden", "depth", "form", "norm", "row_scale", "crc32"})
    if unknown:
        raise ValueError(f"unknown decoder key {unknown[0]!r}")
    codec = CodecConfig(
        vector_len=entry["vector_len"],
        hidden=entry["hidden"],
        depth=entry["depth"],
        decoder=entry["form"],
        norm=entry["norm"],
        row_scale=entry["row_scale"],
        init="normal",  # has no part in decoding; `kmeans` would bound `hidden`
    )
    return DecoderEntry(codec, entry["crc32"])


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
    """File name -> tensor names, at most 5 GB in a file."""
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
    """The index beside several shards, as file name -> text."""
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
    """Write tensors one at a time, in shards of at most 5 GB, with the usual index beside several shards.

    safetensors' own writer wants all tensors of a file in memory; this one holds a single tensor.

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


def write_json(path: Path, value: Any) -> None:
    """Write JSON to a temporary name and rename it when whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1, ensure_ascii=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def sha256_file(path: Path) -> str:
    """Hex digest of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def read_report(folder: Path) -> dict[str, Any]:
    """The report of a compressed model.

    Raises:
        FormatError: not a compressed model, or the report is damaged.
    """
    path = folder / REPORT_NAME
    if not path.is_file():
        raise FormatError(f"{folder}: no {REPORT_NAME}; not a model compressed by pocketllm")
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(report, dict) or "files" not in report:
            raise ValueError("no list of files")
    except ValueError as error:
        raise FormatError(f"{path}: damaged ({error}); fetch the model again") from error
    if report.get("format_version") != FORMAT_VERSION:
        raise FormatError(
            f"{path}: format_version is {report.get('format_version')!r}, this version reads "
            f"{FORMAT_VERSION}; update pocketllm-codec"
        )
    return report


def verify(folder: Path) -> Layout:
    """Check that a compressed model is whole and unaltered.

    Raises:
        FormatError: naming the file, and the tensor where one is to blame.
    """
    report = read_report(folder)
    layout = read_layout(folder)
    altered = [_altered(folder / name, facts) for name, facts in report["files"].items()]
    problems = [problem for problem in altered if problem]
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise FormatError(f"{folder}: no *.safetensors file; fetch the model again")
    for file in weights:
        culprit = _damaged_tensor(file, layout)
        if culprit:
            raise FormatError(culprit)
    if problems:
        raise FormatError(problems[0])
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


def _damaged_tensor(file: Path, layout: Layout) -> str:
    """What is wrong with a packed tensor in this file, or ''."""
    try:
        with safe_open(str(file), framework="pt") as handle:
            names = set(handle.keys())
            for name, entry in layout.matrices.items():
                wanted = [f"{name}.indices", f"{name}.row_scale"]
                if not layout.decoders[entry.decoder].codec.row_scale:
                    wanted.pop()
                if not names.issuperset(wanted):
                    continue
                if checksum(*(handle.get_tensor(key) for key in wanted)) != entry.crc32:
                    return f"{file}: {name}: altered (CRC-32 differs); fetch the file again"
    except (SafetensorError, OSError) as error:
        return f"{file}: not a readable safetensors file ({error}); truncated or altered, fetch it again"
    return ""


def read_layout(folder: Path) -> Layout:
    """The layout in a folder's config.json.

    Raises:
        FormatError: missing, not ours, or malformed.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FormatError(f"{folder}: no config.json; not a compressed model") from error
    except ValueError as error:
        raise FormatError(f"{path}: damaged ({error}); fetch the model again") from error
    quantization = config.get("quantization_config") or {}
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
