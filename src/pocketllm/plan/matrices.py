"""The tensors to compress, the codec of each, and its cost in bits.

The error of a codec is predicted before anything is fitted (`predicted_nmse` of its index form): row-scaled weights
are close enough to Gaussian for the predictions to rank the choices.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from pocketllm.codec.index_form import IndexForm, form_for
from pocketllm.codec.rotation import Seeds
from pocketllm.codec.subvectors import subvectors_per_row
from pocketllm.config import CompressConfig
from pocketllm.config.constants import STRIP_ROWS
from pocketllm.errors import ConfigError
from pocketllm.source.dense_checkpoint import DenseCheckpoint

ROW_SCALE_BITS = 16
"""Stored bits of a row scale."""
CODEWORD_BITS = 16
"""Stored bits of each of the d numbers of a codeword."""
KEPT_END = "embedding or head, kept in 16 bit by the settings"


@dataclass(frozen=True)
class Matrix:
    """One tensor to compress, seen as a matrix.

    shape: as the model holds it. rows, columns: after transposing (Conv1D) or flattening (experts).
    kind: its name without the block number. in_blocks: False for embedding and head.
    strip_rows: approximate number of rows of a strip, on a trellis.
    """

    name: str
    shape: tuple[int, ...]
    rows: int
    columns: int
    kind: str
    in_blocks: bool
    transposed: bool = False
    strip_rows: int = STRIP_ROWS

    @property
    def weights(self) -> int:
        return self.rows * self.columns

    def subvectors(self, vector_len: int) -> int:
        return self.rows * subvectors_per_row(self.columns, vector_len)

    def form(self, spec: Spec) -> IndexForm:
        """How its indices are stored."""
        return form_for(spec.codebook_size, spec.stride, self.strip_rows)

    def own_bits(self, spec: Spec, row_scale: bool) -> int:
        """Bits of packed indices (whole bytes, padding included) and row scales."""
        indices = 8 * self.form(spec).nbytes(self.rows, subvectors_per_row(self.columns, spec.vector_len))
        return indices + (ROW_SCALE_BITS * self.rows if row_scale else 0)


@dataclass(frozen=True, order=True)
class Spec:
    """Size of a codec: d and K; stride: bits each index adds on a trellis, 0 for independent indices."""

    vector_len: int
    codebook_size: int
    stride: int = 0

    @property
    def form(self) -> IndexForm:
        """How indices are stored, except for the strips of a matrix; see `Matrix.form`."""
        return form_for(self.codebook_size, self.stride)

    @cached_property
    def index_bpw(self) -> float:
        """Bits per weight of the indices alone."""
        return self.form.bits / self.vector_len

    @cached_property
    def nmse(self) -> float:
        """Predicted for a unit-variance Gaussian."""
        return self.form.predicted_nmse(self.vector_len)


@dataclass(frozen=True)
class Dense:
    """A tensor that is left dense, and the reason."""

    name: str
    shape: tuple[int, ...]
    reason: str


@dataclass(frozen=True)
class Plan:
    """The plan: a spec for every compressed matrix, the reason for every other tensor.

    codebook_scope is resolved (never `auto`). bits are exact: nothing is rounded or estimated.
    """

    matrices: tuple[Matrix, ...]
    specs: dict[str, Spec]
    dense: tuple[Dense, ...]
    codebook_scope: str
    config: CompressConfig

    def codebook_key(self, matrix: Matrix) -> str:
        """Matrices with the same key share a codebook."""
        return _codebook_key(matrix, self.specs[matrix.name], self.codebook_scope)

    def decoder_key(self, matrix: Matrix) -> str:
        """Matrices with the same key share a decoder (and a codebook)."""
        scope = {"matrix": matrix.name, "kind": matrix.kind, "model": ""}[self.config.decoder_scope]
        return f"{self.codebook_key(matrix)}|{scope}"

    def rotation(self, matrix: Matrix) -> Seeds:
        """Seeds of the rotations of a matrix; the same for all that have the same inputs.

        Embedding and head are rotated on one side only, since single rows of them are looked up; fused
        experts as well, since their rows belong to different experts.
        """
        calibration = self.config.calibration
        if calibration is None or not calibration.rotate:
            return None, None
        both = matrix.in_blocks and len(matrix.shape) == 2
        return (2 * self.config.seed if both else None), 2 * self.config.seed + 1

    def codebook_bits(self, spec: Spec) -> int:
        """Stored bits of a codebook."""
        stored = self.config.codec.codebook_source == "fit"
        return CODEWORD_BITS * spec.codebook_size * spec.vector_len if stored else 0

    def own_bits(self, matrix: Matrix) -> int:
        """Bits of indices and row scales of one matrix."""
        return matrix.own_bits(self.specs[matrix.name], self.config.codec.row_scale)

    @property
    def weights(self) -> int:
        """Compressed weights, all matrices."""
        return sum(m.weights for m in self.matrices)

    def groups(self) -> dict[str, list[Matrix]]:
        """Codebook key -> its matrices, in the model's order."""
        result: dict[str, list[Matrix]] = {}
        for matrix in self.matrices:
            result.setdefault(self.codebook_key(matrix), []).append(matrix)
        return result

    def bits_by_part(self) -> dict[str, int]:
        """Stored bits: indices, row_scales, codebooks, decoders."""
        row_scales = sum(ROW_SCALE_BITS * m.rows for m in self.matrices) if self.config.codec.row_scale else 0
        codebooks = {self.codebook_key(m): self.specs[m.name] for m in self.matrices}
        decoders = {self.decoder_key(m): self.specs[m.name] for m in self.matrices}
        return {
            "indices": sum(self.own_bits(m) for m in self.matrices) - row_scales,
            "row_scales": row_scales,
            "codebooks": sum(self.codebook_bits(spec) for spec in codebooks.values()),
            "decoders": sum(
                count * self.config.codec_for(vector_len).decoder_bits
                for vector_len, count in Counter(spec.vector_len for spec in decoders.values()).items()
            ),
        }

    def matrix_bits(self) -> dict[str, float]:
        """Bits of each matrix with its share (by weights) of the codebook and decoder it uses."""
        result = {m.name: float(self.own_bits(m)) for m in self.matrices}
        for key_of, bits_of in (
            (self.codebook_key, self.codebook_bits),
            (self.decoder_key, lambda spec: self.config.codec_for(spec.vector_len).decoder_bits),
        ):
            sharing: dict[str, list[Matrix]] = {}
            for matrix in self.matrices:
                sharing.setdefault(key_of(matrix), []).append(matrix)
            for members in sharing.values():
                bits, total = bits_of(self.specs[members[0].name]), sum(m.weights for m in members)
                for matrix in members:
                    result[matrix.name] += bits * matrix.weights / total
        return result

    @property
    def bpw(self) -> float:
        """All stored bits of the compressed matrices per weight."""
        return sum(self.bits_by_part().values()) / self.weights


_BLOCK = re.compile(r"^(?P<stem>.*?)\.(?P<number>\d+)\.(?P<rest>.+)$")


def classify(source: DenseCheckpoint, config: CompressConfig) -> tuple[list[Matrix], list[Dense]]:
    """Split the model's tensors into matrices to compress and dense ones with their reason.

    Raises:
        ConfigError: settings that leave every block dense, or an override that matches no matrix.
    """
    numbers = [int(m["number"]) for n in source.names() if (m := _BLOCK.match(n))]
    blocks = max(numbers, default=-1) + 1
    if config.dense_first + config.dense_last >= blocks > 0:
        raise ConfigError(
            f"dense_first={config.dense_first} and dense_last={config.dense_last} leave none of the model's "
            f"{blocks} blocks to compress; lower them"
        )
    ends = _embedding_modules(source)
    matrices: list[Matrix] = []
    dense: list[Dense] = []
    seen = {name: _matrix(source, name, source.shape(name), ends) for name in source.names()}
    names = [name for name, found in seen.items() if isinstance(found, Matrix)]
    for pattern, _ in config.overrides:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ConfigError(
                f"override {pattern!r}: matches no matrix that can be compressed; names look like "
                f"{names[-1] if names else None!r}"
            )
    for name, found in seen.items():
        shape = source.shape(name)
        if isinstance(found, str):
            dense.append(Dense(name, shape, found))
            continue
        match = _BLOCK.match(name)
        number = int(match["number"]) if match else -1
        if (override(name, config) or 0) >= 16:
            dense.append(Dense(name, shape, "left dense by an override"))
        elif found.in_blocks and not config.dense_first <= number < blocks - config.dense_last:
            dense.append(Dense(name, shape, "in a block left dense by the settings"))
        elif not found.in_blocks and config.keep_embeddings:
            dense.append(Dense(name, shape, KEPT_END))
        else:
            matrices.append(found)
    return matrices, dense


def override(name: str, config: CompressConfig) -> float | None:
    """Bits per weight that the overrides set for a matrix; the last matching pattern counts."""
    found = [bits for pattern, bits in config.overrides if fnmatch.fnmatchcase(name, pattern)]
    return found[-1] if found else None


def _embedding_modules(source: DenseCheckpoint) -> set[int]:
    model = source.model
    return {id(m) for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None}


def _matrix(source: DenseCheckpoint, name: str, shape: tuple[int, ...], ends: set[int]) -> Matrix | str:
    """The tensor as a matrix, or the reason why it is not compressed."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    parent, _, leaf = name.rpartition(".")
    module = source.model.get_submodule(parent)
    match = _BLOCK.match(name)
    kind = match["rest"] if match else name
    kind = re.sub(r"\.\d+\.", ".*.", kind).removesuffix(".weight")
    if len(shape) == 3 and match and "expert" in name:
        return Matrix(name, shape, shape[0] * shape[1], shape[2], kind, True)
    if len(shape) != 2:
        return "norm, bias or other small tensor" if len(shape) < 2 else f"a {len(shape)}-D tensor"
    if leaf == "weight" and isinstance(module, nn.Embedding | nn.Linear | Conv1D):
        if id(module) in ends:
            return Matrix(name, shape, *shape, kind, False)
        if isinstance(module, nn.Embedding):
            return "an embedding other than the token embedding"
        if not match:
            return "a linear layer outside the blocks"
        if isinstance(module, Conv1D):
            return Matrix(name, shape, shape[1], shape[0], kind, True, transposed=True)
        return Matrix(name, shape, *shape, kind, True)
    return f"a parameter of {type(module).__name__} (router or similar)"


def _codebook_key(matrix: Matrix, spec: Spec, scope: str) -> str:
    shared = {"matrix": matrix.name, "kind": matrix.kind, "model": ""}[scope]
    overlap = f"+{spec.stride}" if spec.stride else ""
    return f"{spec.vector_len}x{spec.codebook_size}{overlap}|{shared}"
