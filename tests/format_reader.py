"""A second reader of the file format, written from FORMAT.md alone: numpy and the standard library.

Slow and plain on purpose. It uses nothing of the package, so that agreement says something about FORMAT.md.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "U8": "u1"}
_erf = np.vectorize(math.erf, otypes=[np.float64])


def read_safetensors(path: Path) -> dict[str, tuple[str, np.ndarray]]:
    """Name -> (stored dtype, values); BF16 is widened to float32."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    found = {}
    for name, facts in header.items():
        begin, end = (8 + length + offset for offset in facts["data_offsets"])
        if facts["dtype"] == "BF16":
            halves = np.frombuffer(data[begin:end], "<u2")
            values = (halves.astype(np.uint32) << 16).view(np.float32)
        else:
            values = np.frombuffer(data[begin:end], _DTYPES[facts["dtype"]])
        found[name] = facts["dtype"], values.reshape(facts["shape"])
    return found


def splitmix64(count: int, seed: int) -> list[int]:
    """The first `count` outputs."""
    mask, found = (1 << 64) - 1, []
    for i in range(count):
        z = (seed + (i + 1) * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        found.append(z ^ (z >> 31))
    return found


def unpack(data: bytes, bits: int, count: int) -> list[int]:
    """`count` packed numbers."""
    stream = int.from_bytes(data, "little")
    assert stream >> (bits * count) == 0, "bits beyond the last number are set"
    return [(stream >> (i * bits)) & ((1 << bits) - 1) for i in range(count)]


def packed_size(bits: int, count: int) -> int:
    """Bytes of `count` packed numbers."""
    return -(-bits * count // 8)


def rotation(size: int, seed: int) -> np.ndarray:
    """R(seed) [size, size]."""
    odd = size
    while odd % 2 == 0:
        odd //= 2
    hadamard = np.ones((1, 1))
    while len(hadamard) * odd < size:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]]) / math.sqrt(2)
    angle = 2 * math.pi * np.outer(np.arange(odd), np.arange(odd)) / odd
    hartley = (np.cos(angle) + np.sin(angle)) / math.sqrt(odd)
    signs = [-1.0 if z >> 63 else 1.0 for z in splitmix64(size, seed)]
    return np.kron(hadamard, hartley) * np.array(signs)


def hashed(table: np.ndarray, indices: np.ndarray, window: int) -> np.ndarray:
    """Decoded codebook [256, d], indices [rows, n] -> [rows, n, d]."""
    entries = np.clip(np.rint(table * 32), -127, 127) / 32
    low, high = indices % 256, indices >> (window - 8)
    reverse = np.array([int(f"{byte:08b}"[::-1], 2) for byte in range(256)])
    found = [entries[(low + part) % 256, n] for n, part in enumerate((reverse[high], high)[: table.shape[1]])]
    return np.stack(found, axis=-1)


class Reader:
    """A compressed folder. `decode(name)` gives a parameter in float64."""

    def __init__(self, folder: Path) -> None:
        report = json.loads((folder / "pocketllm.json").read_text(encoding="utf-8"))
        assert report["format_version"] in (2, 3)
        for name, facts in report["files"].items():
            data = (folder / name).read_bytes()
            assert (len(data), hashlib.sha256(data).hexdigest()) == (facts["bytes"], facts["sha256"]), name
        assert {p.name for p in folder.iterdir()} == {*report["files"], "pocketllm.json", "README.md"}
        layout = json.loads((folder / "config.json").read_text(encoding="utf-8"))["quantization_config"]
        assert set(layout) == {
            *("quant_method", "producer", "mode", "format_version", "matrices", "codebooks", "decoders"),
        }
        assert (layout["quant_method"], layout["format_version"]) == ("pocketllm", report["format_version"])
        assert isinstance(layout["producer"], str) or set(layout["producer"]) == {"name", "version"}
        self.matrices: dict[str, Any] = layout["matrices"]
        self.codebooks: list[Any] = layout["codebooks"]
        if layout["format_version"] == 2:
            self.codebooks = [[*entry, 0] for entry in self.codebooks]
        self.decoders: list[dict[str, Any]] = layout["decoders"]
        self.stored: dict[str, tuple[str, np.ndarray]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            self.stored.update(read_safetensors(path))

    def decode(self, name: str) -> np.ndarray:
        """One parameter, in its shape."""
        shape, transposed, number, decoder, stride, strip, (s1, s2), crc32 = self.matrices[name]
        if transposed:
            rows, columns = math.prod(shape[:-2]) * shape[-1], shape[-2]
        else:
            rows, columns = math.prod(shape[:-1]), shape[-1]
        size, d, _, _, window = self.codebooks[number]
        per_row = -(-columns // d)
        packed = self.stored[f"{name}.indices"]
        assert packed[0] == "U8" and packed[1].ndim == 1
        data = packed[1].tobytes()
        if self.decoders[decoder]["row_scale"]:
            dtype, scale = self.stored[f"{name}.row_scale"]
            assert dtype == "BF16" and scale.shape == (rows,)
            scale_bytes = (scale.view(np.uint32) >> 16).astype("<u2").tobytes()
        else:
            assert f"{name}.row_scale" not in self.stored
            scale, scale_bytes = np.ones(rows, np.float32), b""
        assert f"{zlib.crc32(data + scale_bytes):08x}" == crc32
        width = window or max(1, math.ceil(math.log2(size)))
        indices = self._indices(data, rows, per_row, width, stride, strip)
        if window:
            table = self._decoded(self.codebook(number)[None], self.decoders[decoder], decoder)[0]
            unit = hashed(table, indices, window)
        else:
            assert stride == 0 or size == 1 << width
            unit = self._decoded(self.codebook(number)[indices], self.decoders[decoder], decoder)
        matrix = scale[:, None] * unit.reshape(rows, -1)[:, :columns]
        if s1 is not None:
            matrix = rotation(rows, s1).T @ matrix
        if s2 is not None:
            matrix = matrix @ rotation(columns, s2)
        if not transposed:
            return matrix.reshape(shape)
        *experts, columns, rows = shape
        return np.swapaxes(matrix.reshape(*experts, rows, columns), -1, -2)

    @staticmethod
    def _indices(data: bytes, rows: int, per_row: int, width: int, stride: int, strip: int) -> np.ndarray:
        """[rows, n]."""
        if stride == 0:
            assert len(data) == packed_size(width, rows * per_row)
            return np.array(unpack(data, width, rows * per_row)).reshape(rows, per_row)
        found = np.zeros((rows, per_row), dtype=np.int64)
        strips = max(1, round(rows / strip))
        first = offset = 0
        for strip in range(strips):
            length = rows // strips + (1 if strip < rows % strips else 0)
            nbytes = packed_size(stride, length * per_row)
            index = 0
            for t, u in enumerate(unpack(data[offset : offset + nbytes], stride, length * per_row)):
                index = (u << (width - stride)) + (index >> stride)
                found[first + t % length, t // length] = index
            first, offset = first + length, offset + nbytes
        assert (first, offset) == (rows, len(data))
        return found

    def codebook(self, number: int) -> np.ndarray:
        """[K, d] float32."""
        size, d, seed, crc32, window = self.codebooks[number]
        assert not window or (9 <= window <= 16 and size == 256 and d in (1, 2) and seed is None)
        name = f"pocketllm.codebooks.{number}.weight"
        if seed is None:
            dtype, values = self.stored[name]
            assert dtype == "F16"
        else:
            assert name not in self.stored
            quantile = NormalDist().inv_cdf
            drawn = [quantile(((z >> 32) + 0.5) / 2**32) for z in splitmix64(size * d, seed)]
            values = np.array(drawn).astype("<f4").astype("<f2")
        assert f"{zlib.crc32(values.tobytes()):08x}" == crc32
        found: np.ndarray = values.reshape(size, d).astype(np.float32)
        return found

    def _decoded(self, q: np.ndarray, settings: dict[str, Any], number: int) -> np.ndarray:
        """[rows, n, d] codewords -> decoded subvectors, in float64."""
        parts = [self.stored[f"pocketllm.decoders.{number}.{part}"] for part in ("up", "down")]
        assert all(dtype == "F16" for dtype, _ in parts)
        crc32 = zlib.crc32(b"".join(values.tobytes() for _, values in parts))
        assert f"{crc32:08x}" == settings["crc32"]
        up, down = (values.astype(np.float64) for _, values in parts)
        q = q.astype(np.float64)
        axes = {"rln": (1, 2), "ln": (2,)}.get(settings["norm"]) if settings["form"] == "row" else None

        def norm(x: np.ndarray) -> np.ndarray:
            if axes is None:
                return x
            centred = x - x.mean(axis=axes, keepdims=True)
            return centred / np.sqrt((centred**2).mean(axis=axes, keepdims=True) + 1e-6)

        def gelu(x: np.ndarray) -> np.ndarray:
            return x * (1 + _erf(x / math.sqrt(2))) / 2

        def block(x: np.ndarray, k: int) -> np.ndarray:
            if settings["hidden"] == 0:
                return x @ up[k] + down[k]
            return gelu(x @ up[k]) @ down[k]

        if settings["depth"] == 0:
            assert up.size == down.size == 0
            return q
        for k in range(settings["depth"] - 1):
            q = q + block(norm(q), k)
        return block(q, settings["depth"] - 1)
