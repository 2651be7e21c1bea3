"""What a compression did, in numbers: bytes on disk, ratios, bits, errors."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class MatrixReport:
    """One compressed matrix.

    bpw: its stored bits with its share of codebook and decoder, per weight. nmse: of the decoded weights.
    proxy_error: tr(E H E^T) / tr(W H W^T) where it was calibrated.
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


@dataclass(frozen=True)
class Report:
    """Sizes in bytes; ratios are dense bytes over stored bytes.

    bytes_on_disk: every file of the output folder. ratio_files_*: whole folders, tokenizer and all.
    ratio_matrices_*: the compressed matrices with their codebooks, decoders and scales.
    bpw_blocks: linear weights of the blocks that are compressed; bpw_all: every parameter of the model.
    bytes_by_part: indices, row_scales, codebooks, decoders, dense, other_files (tokenizer and the like),
        headers (of the weight files, config.json and the report).
    fits: of each codebook, the sample's nmse by decoder before and after training, and how it went.
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
    seconds: float = 0.0
    fits: tuple[dict[str, Any], ...] = ()
    versions: dict[str, str] | None = None
    is_plan: bool = False

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


def counting_adapter(report: Mapping[str, Any], nbytes: int) -> dict[str, Any]:
    """The report with the bytes of an adapter counted in every size: they serve all matrices.

    Args:
        report: as stored in `pocketllm.json`.
    """
    matrices = [(m, math.prod(m["shape"])) for m in report["matrices"]]
    coded = sum(weights for _, weights in matrices)
    blocks = sum(weights for m, weights in matrices if re.search(r"\.\d+\.", m["name"]))
    bits, disk = 8 * nbytes, report["bytes_on_disk"]

    def rounded(value: float) -> float:
        return float(f"{value:.6g}")

    changed: dict[str, Any] = {
        "bytes_on_disk": disk + nbytes,
        "bytes_by_part": {**report["bytes_by_part"], "adapter": nbytes},
        "bpw_all": rounded(report["bpw_all"] + bits / (report["dense_model_bytes_bf16"] / 2)),
        "bpw_matrices": rounded(report["bpw_matrices"] + bits / coded),
        "bpw_blocks": rounded(report["bpw_blocks"] + bits / blocks) if blocks else report["bpw_blocks"],
    }
    for dtype, dense_bits in (("bf16", 16), ("fp32", 32)):
        stored = dense_bits * coded / report[f"ratio_matrices_{dtype}"]
        changed[f"ratio_matrices_{dtype}"] = rounded(dense_bits * coded / (stored + bits))
        changed[f"ratio_files_{dtype}"] = rounded(report[f"ratio_files_{dtype}"] * disk / (disk + nbytes))
    return {**report, **changed}


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    import importlib.metadata
    import platform

    found = {"python": platform.python_version()}
    for name in ("pocketllm-codec", "torch", "transformers", "faiss-cpu", "safetensors"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "unknown"
    return found
