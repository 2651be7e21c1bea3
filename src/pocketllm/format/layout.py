"""The layout of a compressed model: everything about its stored form that is not a tensor.

It is the body of `quantization_config` in config.json. FORMAT.md specifies it.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch

from pocketllm.codec.hashed_table import ENTRIES, MOST_COMPONENTS, WINDOWS
from pocketllm.codec.index_form import IndexForm, form_for
from pocketllm.codec.subvectors import subvectors_per_row
from pocketllm.config import CodecConfig
from pocketllm.errors import ConfigError, FormatError

FORMAT_VERSION = 3  # the newest; `Layout.format_version` is what a model needs
READABLE_VERSIONS = (2, 3)
_MAX_SIZE, _MAX_VECTOR_LEN = 1 << 20, 64  # K and d of a codebook
_CRC32 = re.compile("[0-9a-f]{8}")
STORE = "pocketllm"
PARTS = ("indices", "row_scale", "weight", "up", "down")  # of a matrix, a codebook, a decoder


@dataclass(frozen=True)
class MatrixEntry:
    """How one parameter is stored.

    shape: as the model holds it. transposed: stored rows are the parameter's columns (Conv1D, the
    experts of some models).
    codebook, decoder: numbers in the store. stride: bits that each index adds on a trellis, 0 for independent
    indices. strip_rows: approximate number of rows of a strip. rotation: seeds of the rotations of its columns
    (each `rows` long) and of its rows, None if that side is not rotated. crc32: of indices then row_scale, in hex.
    """

    shape: tuple[int, ...]
    transposed: bool
    codebook: int
    decoder: int
    stride: int
    strip_rows: int
    rotation: tuple[int | None, int | None]
    crc32: str

    def __post_init__(self) -> None:
        """Raises ValueError."""
        _integers("shape", self.shape, 1)
        _boolean("transposed", self.transposed)
        _checksum(self.crc32)
        if len(self.shape) not in (2, 3):
            raise ValueError(f"shape {list(self.shape)} with transposed {self.transposed}")
        _integers("codebook, decoder and stride", (self.codebook, self.decoder, self.stride), 0)
        _integers("strip_rows", [self.strip_rows], 1)
        _integers("rotation", [seed for seed in self.rotation if seed is not None], 0)

    def form(self, codebook: CodebookEntry) -> IndexForm:
        """How its indices are stored.

        Raises:
            ValueError: the stride does not fit the codebook.
        """
        return form_for(codebook.size, self.stride, self.strip_rows, codebook.window)

    @property
    def rows(self) -> int:
        """Rows of the stored matrix."""
        *experts, inner, last = self.shape
        return math.prod(experts) * (last if self.transposed else inner)

    @property
    def columns(self) -> int:
        """Columns of the stored matrix."""
        return self.shape[-2] if self.transposed else self.shape[-1]


@dataclass(frozen=True)
class CodebookEntry:
    """Size of a codebook [size, vector_len], the CRC-32 of its bytes, and the seed it is generated from.

    seed: None for a stored codebook; a generated one is not stored.
    window: bits of an index on the hashed trellis that uses it, 0 for a codebook that indices number.
    """

    size: int
    vector_len: int
    seed: int | None
    crc32: str
    window: int = 0

    def __post_init__(self) -> None:
        """Raises ValueError."""
        _integers("codebook's K", [self.size], 2, _MAX_SIZE)
        _integers("codebook's d", [self.vector_len], 1, _MAX_VECTOR_LEN)
        _integers("seed", [] if self.seed is None else [self.seed], 0)
        _integers("codebook's window", [self.window], 0, WINDOWS[1])
        if self.window:
            _integers("hashed codebook's window", [self.window], *WINDOWS)
            _integers("hashed codebook's K", [self.size], ENTRIES, ENTRIES)
            _integers("hashed codebook's d", [self.vector_len], 1, MOST_COMPONENTS)
            if self.seed is not None:
                raise ValueError("a hashed codebook has no seed")
        _checksum(self.crc32)


@dataclass(frozen=True)
class DecoderEntry:
    """Settings of a decoder and the CRC-32 of `up` then `down`."""

    codec: CodecConfig
    crc32: str

    def __post_init__(self) -> None:
        """Raises ValueError."""
        _checksum(self.crc32)


@dataclass(frozen=True)
class Layout:
    """Everything about the stored form that is not a tensor: the body of `quantization_config`."""

    matrices: dict[str, MatrixEntry]
    codebooks: tuple[CodebookEntry, ...]
    decoders: tuple[DecoderEntry, ...]

    @property
    def format_version(self) -> int:
        """The oldest version that has what this layout uses: hashed codebooks came with version 3."""
        return 3 if any(entry.window for entry in self.codebooks) else 2

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "format_version": self.format_version,
            "matrices": {
                name: [getattr(entry, field.name) for field in fields(MatrixEntry)]
                for name, entry in self.matrices.items()
            },
            "codebooks": [
                [getattr(entry, field.name) for field in fields(CodebookEntry)[: 2 + self.format_version]]
                for entry in self.codebooks
            ],
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
        if version not in READABLE_VERSIONS:
            raise FormatError(
                f"{where}: format_version is {version!r}, this version reads 2 and 3; "
                + ("compress the model again" if version == 1 else "update pocketllm-codec")
            )
        known = {"format_version", "matrices", "codebooks", "decoders"}
        unknown = sorted(set(values) - known)
        if unknown:
            raise FormatError(f"{where}: unknown key {unknown[0]!r} in quantization_config")
        try:
            matrices, keys = {}, [field.name for field in fields(MatrixEntry)]
            for name, stored in values["matrices"].items():
                if len(stored) != len(keys):
                    raise ValueError(f"{name}: got {len(stored)} values, wanted {len(keys)}")
                entry = dict(zip(keys, stored, strict=True))
                of_columns, of_rows = entry["rotation"]
                entry |= {"shape": tuple(entry["shape"]), "rotation": (of_columns, of_rows)}
                matrices[name] = MatrixEntry(**entry)
            codebooks = tuple(_codebook_entry(entry, version) for entry in values["codebooks"])
            decoders = tuple(_decoder_entry(entry) for entry in values["decoders"])
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError, ConfigError) as error:
            raise FormatError(f"{where}: malformed quantization_config ({error!r})") from error
        layout = cls(matrices, codebooks, decoders)
        for name in matrices:
            problem = layout._contradiction(name)
            if problem:
                raise FormatError(f"{where}: {name}: {problem}")
        return layout

    def _contradiction(self, name: str) -> str:
        """An inconsistency in the entry of a matrix, or ''."""
        entry = self.matrices[name]
        if entry.codebook >= len(self.codebooks) or entry.decoder >= len(self.decoders):
            return "names a codebook or decoder that does not exist"
        codebook, codec = self.codebooks[entry.codebook], self.decoders[entry.decoder].codec
        if codebook.vector_len != codec.vector_len:
            return f"its codebook has vector_len {codebook.vector_len}, its decoder {codec.vector_len}"
        if codebook.window and codec.decoder != "lookup":
            return f"its codebook is hashed, its decoder of form {codec.decoder}; wanted lookup"
        try:
            entry.form(codebook)
        except ValueError as error:
            return str(error)
        return ""

    def checksums(self) -> dict[str, str]:
        """CRC-32 of tensors with a common checksum, by the common part of their names."""
        found = {name: entry.crc32 for name, entry in self.matrices.items()}
        found |= {f"{STORE}.codebooks.{n}": entry.crc32 for n, entry in enumerate(self.codebooks)}
        return found | {f"{STORE}.decoders.{n}": entry.crc32 for n, entry in enumerate(self.decoders)}

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Every stored tensor that the layout describes, in writing order: name -> (dtype, shape)."""
        found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
        for name, entry in self.matrices.items():
            codebook = self.codebooks[entry.codebook]
            per_row = subvectors_per_row(entry.columns, codebook.vector_len)
            nbytes = entry.form(codebook).nbytes(entry.rows, per_row)
            found[f"{name}.indices"] = torch.uint8, (nbytes,)
            if self.decoders[entry.decoder].codec.row_scale:
                found[f"{name}.row_scale"] = torch.bfloat16, (entry.rows,)
        for number, codebook in enumerate(self.codebooks):
            if codebook.seed is None:
                size = codebook.size, codebook.vector_len
                found[f"{STORE}.codebooks.{number}.weight"] = torch.float16, size
        for number, decoder in enumerate(self.decoders):
            for part, net_shape in zip(("up", "down"), decoder.codec.network_shapes, strict=True):
                found[f"{STORE}.decoders.{number}.{part}"] = torch.float16, net_shape
        return found


def _codebook_entry(stored: Sequence[Any], version: int) -> CodebookEntry:
    """Four values in version 2, five in version 3."""
    if len(stored) != 2 + version:
        raise ValueError(f"codebook: got {len(stored)} values, wanted {2 + version}")
    return CodebookEntry(*stored)


def _decoder_entry(entry: Mapping[str, Any]) -> DecoderEntry:
    unknown = sorted(set(entry) - {"vector_len", "hidden", "depth", "form", "norm", "row_scale", "crc32"})
    if unknown:
        raise ValueError(f"unknown decoder key {unknown[0]!r}")
    _integers("decoder's vector_len", [entry["vector_len"]], 1, _MAX_VECTOR_LEN)
    _integers("decoder's hidden and depth", (entry["hidden"], entry["depth"]), 0)
    _boolean("decoder's row_scale", entry["row_scale"])
    numbers = entry["vector_len"], entry["hidden"], entry["depth"]
    return DecoderEntry(_codec(*numbers, entry["form"], entry["norm"], entry["row_scale"]), entry["crc32"])


@functools.lru_cache(maxsize=64)
def _codec(vector_len: int, hidden: int, depth: int, form: Any, norm: Any, row_scale: bool) -> CodecConfig:
    """The settings of a decoder, which most of a model's have in common."""
    return CodecConfig(
        vector_len=vector_len,
        hidden=hidden,
        depth=depth,
        decoder=form,
        norm=norm,
        row_scale=row_scale,
        init="normal",  # not used in decoding; `kmeans` would constrain `hidden`
    )


def _integers(what: str, values: Iterable[Any], least: int, most: int = (1 << 63) - 1) -> None:
    for value in values:
        if type(value) is not int or not least <= value <= most:
            raise ValueError(f"{what}: got {value!r}, wanted an integer from {least} to {most}")


def _boolean(what: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{what}: got {value!r}, wanted true or false")


def _checksum(value: Any) -> None:
    if not (isinstance(value, str) and _CRC32.fullmatch(value)):
        raise ValueError(f"crc32: got {value!r}, wanted 8 lower-case hexadecimal digits")
