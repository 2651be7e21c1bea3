"""The stored facts about a compressed model, from `pocketllm.json` and `config.json`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from pocketllm.errors import FormatError
from pocketllm.files import real_path
from pocketllm.format import (
    REPORT_NAME,
    Layout,
    counting_adapter,
    folder_bytes,
    read_layout,
    read_report,
    verify,
    weighted_mean,
)
from pocketllm.recover import check_adapter, read_record
from pocketllm.source import name_of

PER_KIND = 8  # matrices of a kind that are decoded, spread over the depth
K = TypeVar("K")
_BLOCK = re.compile(r"^.*?\.(\d+)\..+$")


@dataclass(frozen=True)
class MatrixFacts:
    """One compressed matrix; None where the report does not say. Provisional.

    block: its number, None outside the blocks (embedding, head). codebook, decoder: numbers in the store.
    stride: bits that each index adds on a trellis, 0 for independent indices.
    """

    name: str
    kind: str
    block: int | None
    shape: tuple[int, ...]
    codebook: int
    decoder: int
    stride: int
    vector_len: int | None
    codebook_size: int | None
    bpw: float | None
    nmse: float | None
    proxy_error: float | None
    utilization: float | None
    codebook_perplexity: float | None

    @property
    def weights(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class AdapterFacts:
    """An adapter of the model. bytes: of its folder; settings: PEFT's; record: as `read_record`."""

    folder: Path
    bytes: int
    settings: Mapping[str, Any]
    record: Mapping[str, Any] | None

    @property
    def name(self) -> str:
        return real_path(self.folder).name


@dataclass(frozen=True)
class ModelFacts:
    """A compressed model and perhaps an adapter trained on it. Provisional.

    blocks: how many the model has. matrices: without the adapter. report: the JSON as stored; with an adapter,
    its bytes are counted in every size.
    """

    folder: Path
    matrices: tuple[MatrixFacts, ...]
    blocks: int
    layout: Layout
    report: Mapping[str, Any] = field(repr=False)
    adapter: AdapterFacts | None = None

    @property
    def name(self) -> str:
        """The folder's name, and the adapter's."""
        return name_of(self.folder) + (f" + {self.adapter.name}" if self.adapter else "")

    @property
    def kinds(self) -> list[str]:
        """Kinds of the matrices inside blocks, in the model's order."""
        return list(dict.fromkeys(m.kind for m in self.matrices if m.block is not None))

    @property
    def outside(self) -> list[MatrixFacts]:
        """Matrices outside the blocks."""
        return [m for m in self.matrices if m.block is None]

    def grid(self, value: Callable[[MatrixFacts], float | None]) -> list[list[float | None]]:
        """[blocks][kinds]: the mean of `value` by weights; None where nothing is compressed."""
        cells = grouped(self.matrices, lambda m: (m.block, m.kind))
        return [
            [mean(cells.get((block, kind), []), value) for kind in self.kinds] for block in range(self.blocks)
        ]


def grouped(matrices: Iterable[MatrixFacts], key: Callable[[MatrixFacts], K]) -> dict[K, list[MatrixFacts]]:
    """Key -> the matrices that have it, both in the order of the matrices."""
    groups: dict[K, list[MatrixFacts]] = {}
    for matrix in matrices:
        groups.setdefault(key(matrix), []).append(matrix)
    return groups


def mean(matrices: Iterable[MatrixFacts], value: Callable[[MatrixFacts], float | None]) -> float | None:
    """Mean of a value, each matrix counted by its weights; None if any lacks it or there are none."""
    return weighted_mean((value(matrix), matrix.weights) for matrix in matrices)


def spread(matrices: Sequence[MatrixFacts]) -> list[MatrixFacts]:
    """At most `PER_KIND` of the matrices, at equal distances."""
    count = min(PER_KIND, len(matrices))
    return [matrices[round(n * (len(matrices) - 1) / max(1, count - 1))] for n in range(count)]


def read_model(folder: Path, check: bool = True) -> ModelFacts:
    """Read the stored facts about a compressed model. Provisional.

    Args:
        folder: a compressed model. check: compare every file with its checksum.

    Raises:
        FormatError: not a compressed model, damaged, or of another format version.
    """
    report = read_report(folder)
    layout = verify(folder) if check else read_layout(folder)
    entries = {entry["name"]: entry for entry in report["matrices"]}
    for name in layout.matrices:
        if name not in entries:
            raise FormatError(f"{folder / REPORT_NAME}: damaged ({name} is missing); fetch the model again")
    matrices = tuple(_facts(entries[name], layout) for name in layout.matrices)
    names = [*layout.matrices, *(str(entry["name"]) for entry in report["skipped"])]
    blocks = max((n for n in map(block_of, names) if n is not None), default=-1) + 1
    return ModelFacts(folder=folder, matrices=matrices, blocks=blocks, layout=layout, report=report)


def with_adapter(model: ModelFacts, adapter: Path) -> ModelFacts:
    """The model together with an adapter that was trained on it.

    Raises:
        FormatError, ConfigError: as `check_adapter`.
    """
    facts = AdapterFacts(
        folder=adapter,
        settings=check_adapter(adapter, model.folder),
        bytes=folder_bytes(adapter),
        record=read_record(adapter),
    )
    return replace(model, report=counting_adapter(model.report, facts.bytes), adapter=facts)


def block_of(name: str) -> int | None:
    """Number of the block a tensor belongs to: the first number in its name. Provisional."""
    match = _BLOCK.match(name)
    return int(match[1]) if match else None


def _facts(entry: Mapping[str, Any], layout: Layout) -> MatrixFacts:
    name = entry["name"]
    stored = layout.matrices[name]
    return MatrixFacts(
        name=name,
        kind=str(entry.get("kind", name)),
        block=block_of(name),
        shape=stored.shape,
        codebook=stored.codebook,
        decoder=stored.decoder,
        stride=stored.stride,
        vector_len=entry.get("vector_len"),
        codebook_size=entry.get("codebook_size"),
        utilization=_number(entry.get("codebook_utilization")),
        **{key: _number(entry.get(key)) for key in ("bpw", "nmse", "proxy_error", "codebook_perplexity")},
    )


def _number(value: Any) -> float | None:
    """A finite number, or None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
