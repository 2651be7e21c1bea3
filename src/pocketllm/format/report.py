"""The report of a compression: bytes on disk, ratios, bits, errors."""

from __future__ import annotations

import functools
import math
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, replace
from typing import Any

RUN_FACTS = ("seconds", "peak_memory_bytes", "peak_gpu_memory_bytes")  # of a Report; not stored
NO_USE = "the model class has no use for it"
"""Why a stored tensor is skipped that belongs to no parameter of the model."""
IN_TOWER = "outside the language model's blocks (a vision or audio tower or similar)"
KEPT_END = "embedding or head, kept in 16 bit by the settings"
BY_OVERRIDE = "left dense by an override"
IN_DENSE_BLOCK = "in a block left dense by the settings"


@dataclass(frozen=True)
class MatrixReport:
    """One compressed matrix.

    bpw: its stored bits with its share of codebook and decoder, per weight. nmse: of the decoded weights.
    proxy_error: tr(E H E^T) / tr(W H W^T), if it was calibrated.
    columns: weights in a row of the encoded matrix, the number of the layer's inputs.
    input_tokens: number of tokens behind its Hessian, if it was calibrated; 0: no input was seen.
    unseen_experts: number of fused experts that saw no token.
    stride: bits that each index adds on a trellis, None for independent indices.
    codebook_utilization: share of its codebook's codewords used by all matrices that share the codebook.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    bpw: float
    nmse: float
    proxy_error: float | None
    codebook_utilization: float
    codebook_perplexity: float
    vector_len: int
    codebook_size: int
    stride: int | None = None
    columns: int = 0
    input_tokens: int | None = None
    unseen_experts: int | None = None


@dataclass(frozen=True)
class Report:
    """Result of a compression: sizes in bytes; ratios are dense bytes over stored bytes.

    bytes_on_disk: every file of the output folder. ratio_files_*: of all files, tokenizer included.
    ratio_matrices_*: of the compressed matrices with their codebooks, decoders and scales.
    bpw_blocks: linear weights of the blocks, including those left dense; bpw_all: every parameter of the model.
    bytes_by_part: indices, row_scales, codebooks, decoders, dense, other_files (tokenizer etc.),
        headers (of the weight files, config.json, the report and the model card).
    fits: of each codebook, the sample's nmse by decoder before and after training, and how it went.
    seconds, peak_memory_bytes, peak_gpu_memory_bytes: of the run that made it. They are not stored, since the
        same arguments give the same bytes; a report read from a folder has None.
    left_out: files of the dense model's folder that were not copied, and why; not stored if there are none.
    gguf: of a model read from a GGUF file: name of the file, name of its quantization, number of tensors by type;
        errors are measured against the dequantized values. Not stored for other models.
    is_plan: from a dry run; nmse is predicted, utilization unknown.
    """

    model: str
    bytes_on_disk: int
    ratio_files_bf16: float
    ratio_files_fp32: float
    ratio_matrices_bf16: float
    ratio_matrices_fp32: float
    bpw_blocks: float
    bpw_matrices: float
    bpw_all: float
    bytes_by_part: dict[str, int]
    dense_model_bytes_bf16: int
    matrices: tuple[MatrixReport, ...]
    skipped: tuple[dict[str, Any], ...]
    codebook_scope: str
    config: dict[str, Any]
    seconds: float | None = None
    peak_memory_bytes: int | None = None
    peak_gpu_memory_bytes: int | None = None
    fits: tuple[dict[str, Any], ...] = ()
    versions: dict[str, str] | None = None
    left_out: dict[str, str] | None = None
    gguf: dict[str, Any] | None = None
    is_plan: bool = False

    def of_run(self, started: float, device: str) -> Report:
        """The report with the duration and peak memory of the run that ends now.

        Args:
            started: `time.monotonic()` at its start. device: `cpu` or `cuda`.
        """
        resident, on_gpu = peak_memory_bytes(device)
        return replace(
            self,
            seconds=time.monotonic() - started,
            peak_memory_bytes=resident,
            peak_gpu_memory_bytes=on_gpu,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Report:
        """From the JSON of a compressed model; keys that are not a report's are left out."""
        fields = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        fields["matrices"] = tuple(MatrixReport(**m) for m in values["matrices"])
        fields["skipped"] = tuple(values["skipped"])
        return cls(**fields)


_MEASURED = ("nmse", "proxy_error", "codebook_utilization", "codebook_perplexity")  # null where unknown
_POSITIVE = (  # what sizes and ratios are divided by
    *("bytes_on_disk", "dense_model_bytes_bf16", "vector_len", "codebook_size"),
    *(f"ratio_{what}_{dtype}" for what in ("files", "matrices") for dtype in ("bf16", "fp32")),
)
_JSON_TYPES: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "float": (int, float),
    "bool": bool,
    "dict": dict,
    "tuple": (list, tuple),
}


def check_report(values: Mapping[str, Any]) -> None:
    """Check that the JSON of a report has every required key with a value of its type.

    Raises:
        ValueError: names the key.
    """
    _check_fields(Report, values, "")
    for number, matrix in enumerate(values["matrices"]):
        _check_fields(MatrixReport, matrix, f"matrices[{number}].")
        if not all(isinstance(size, int) and size > 0 for size in matrix["shape"]):
            raise ValueError(f"matrices[{number}].shape: got {matrix['shape']!r}")
    for number, entry in enumerate(values["skipped"]):
        if not all(isinstance(_at(entry, key), str) for key in ("name", "reason")):
            raise ValueError(f"skipped[{number}]: wanted name and reason")
    for part, nbytes in values["bytes_by_part"].items():
        if not isinstance(nbytes, int):
            raise ValueError(f"bytes_by_part.{part}: got {nbytes!r}")


def _check_fields(cls: Any, values: Any, where: str) -> None:
    for name, text, wanted, is_optional in _field_types(cls):
        value: Any = _at(values, name)
        if value is None and is_optional:
            continue
        if not isinstance(value, wanted) or isinstance(value, bool) != (wanted is bool):
            raise ValueError(f"{where}{name}: got {value!r}, wanted {text}")
        if name in _POSITIVE and not _is_positive(value):
            raise ValueError(f"{where}{name}: got {value!r}, wanted more than 0")


@functools.cache
def _field_types(cls: Any) -> tuple[tuple[str, Any, Any, bool], ...]:
    """(name, its type as it is written, the types of its JSON, whether it may be missing) of every field."""
    return tuple(
        (
            entry.name,
            entry.type,
            _JSON_TYPES[re.split(r"\W", str(entry.type))[0]],
            entry.default is not MISSING or entry.name in _MEASURED,
        )
        for entry in fields(cls)
    )


def _is_positive(value: Any) -> bool:
    return bool(0 < value < math.inf)


def _at(values: Any, key: str) -> Any:
    return values.get(key) if isinstance(values, Mapping) else None


def weighted_mean(values: Iterable[tuple[float | None, int]]) -> float | None:
    """Weighted mean over matrices; None if a value is unknown or not finite, or there are none.

    Args:
        values: (value, number of the matrix's weights).
    """
    total, weights = 0.0, 0
    for value, count in values:
        if value is None or not math.isfinite(value):
            return None
        total += value * count
        weights += count
    return total / weights if weights else None


def rounded(value: float) -> float:
    """Six significant digits, as stored in reports; values below 1e-9 become 0."""
    return 0.0 if abs(value) < 1e-9 else float(f"{value:.6g}")


def peak_memory_bytes(device: str = "cpu") -> tuple[int | None, int | None]:
    """Peak memory of this process: resident, and on the GPU if that is the device."""
    gpu = None
    if device != "cpu":
        import torch

        gpu = torch.cuda.max_memory_allocated()
    try:
        import resource
        import sys
    except ImportError:  # not on Windows
        return None, gpu
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, gpu


def is_linear_weight_of_a_block(name: str, shape: Sequence[int]) -> bool:
    """Whether `bpw_blocks` counts a parameter."""
    return len(shape) >= 2 and re.search(r"\.\d+\.", name) is not None


def counting_adapter(report: Mapping[str, Any], nbytes: int) -> dict[str, Any]:
    """The report with the bytes of an adapter added to every size, since they serve all matrices.

    Args:
        report: as stored in `pocketllm.json`.
    """
    matrices = [(m, math.prod(m["shape"])) for m in report["matrices"]]
    encoded = sum(weights for _, weights in matrices)
    blocks = sum(
        math.prod(m["shape"])
        for m in (*report["matrices"], *report["skipped"])
        if is_linear_weight_of_a_block(m["name"], m["shape"])
    )
    bits, disk = 8 * nbytes, report["bytes_on_disk"]
    changed: dict[str, Any] = {
        "bytes_on_disk": disk + nbytes,
        "bytes_by_part": {**report["bytes_by_part"], "adapter": nbytes},
        "bpw_all": rounded(report["bpw_all"] + bits / (report["dense_model_bytes_bf16"] / 2)),
        "bpw_matrices": rounded(report["bpw_matrices"] + bits / encoded),
        "bpw_blocks": rounded(report["bpw_blocks"] + bits / blocks) if blocks else report["bpw_blocks"],
    }
    for dtype, dense_bits in (("bf16", 16), ("fp32", 32)):
        stored = dense_bits * encoded / report[f"ratio_matrices_{dtype}"]
        changed[f"ratio_matrices_{dtype}"] = rounded(dense_bits * encoded / (stored + bits))
        changed[f"ratio_files_{dtype}"] = rounded(report[f"ratio_files_{dtype}"] * disk / (disk + nbytes))
    return {**report, **changed}
