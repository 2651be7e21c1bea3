"""The tensors to compress, the codec of each, and its cost in bits.

The error of a codec is predicted before anything is fitted (`predicted_nmse` of its index form): row-scaled weights
are close enough to Gaussian for the predictions to rank the choices.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cached_property, lru_cache

from pocketllm.codec.index_form import IndexForm, form_for
from pocketllm.codec.rotation import Seeds
from pocketllm.codec.subvectors import subvectors_per_row
from pocketllm.config import CompressConfig
from pocketllm.config.constants import STRIP_ROWS

ROW_SCALE_BITS = 16
"""Stored bits of a row scale."""
CODEWORD_BITS = 16
"""Stored bits of each of the d numbers of a codeword."""


@dataclass(frozen=True)
class Matrix:
    """One tensor to compress, seen as a matrix.

    shape: as the model holds it. rows, columns: after transposing (Conv1D) or flattening (experts).
    kind: its name without the block number. in_blocks: False for embedding and head. in_tower: outside the language
    model's blocks, and never calibrated.
    experts: number of experts whose matrices it holds, one below the other; 0 if it is a single matrix.
    strip_rows: approximate number of rows of a strip, on a trellis.
    """

    name: str
    shape: tuple[int, ...]
    rows: int
    columns: int
    kind: str
    in_blocks: bool
    transposed: bool = False
    in_tower: bool = False
    strip_rows: int = STRIP_ROWS
    experts: int = 0

    @property
    def weights(self) -> int:
        return self.rows * self.columns

    def subvectors(self, vector_len: int) -> int:
        return self.rows * subvectors_per_row(self.columns, vector_len)

    def form(self, spec: Spec) -> IndexForm:
        """How its indices are stored."""
        return _form(spec, self.strip_rows)

    def own_bits(self, spec: Spec, row_scale: bool) -> int:
        """Bits of packed indices (whole bytes, padding included) and row scales."""
        indices = 8 * _nbytes(spec, self.rows, self.columns, self.strip_rows)
        return indices + (ROW_SCALE_BITS * self.rows if row_scale else 0)


@dataclass(frozen=True, order=True)
class Spec:
    """Size of a codec: d and K; stride: bits each index adds on a trellis, 0 for independent indices.

    window: bits of an index on a hashed trellis, 0 for the other forms.
    """

    vector_len: int
    codebook_size: int
    stride: int = 0
    window: int = 0

    @property
    def form(self) -> IndexForm:
        """How indices are stored, except for the strips of a matrix; see `Matrix.form`."""
        return form_for(self.codebook_size, self.stride, window=self.window)

    @cached_property
    def index_bpw(self) -> float:
        """Bits per weight of the indices alone."""
        return self.form.bits / self.vector_len

    @cached_property
    def nmse(self) -> float:
        """Predicted for a unit-variance Gaussian."""
        return self.form.predicted_nmse(self.vector_len)


@lru_cache(maxsize=1 << 16)
def _nbytes(spec: Spec, rows: int, columns: int, strip_rows: int) -> int:
    """Bytes of packed indices; plans ask for the same ones very often, and fused experts have thousands of strips."""
    return _form(spec, strip_rows).nbytes(rows, subvectors_per_row(columns, spec.vector_len))


def _form(spec: Spec, strip_rows: int) -> IndexForm:
    return form_for(spec.codebook_size, spec.stride, strip_rows, spec.window)


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
        return f"{self.codebook_key(matrix)}|{self.shared(matrix)[1]}"

    def rotation(self, matrix: Matrix) -> Seeds:
        """Seeds of the rotations of a matrix; the same for all that have the same inputs.

        Embedding and head are rotated on one side only, since single rows of them are looked up; fused
        experts as well, since their rows belong to different experts.
        """
        calibration = self.config.calibration
        if calibration is None or not calibration.rotate:
            return None, None
        both = matrix.in_blocks and not matrix.experts
        return (2 * self.config.seed if both else None), 2 * self.config.seed + 1

    def shared(self, matrix: Matrix) -> tuple[str, str]:
        """What matrices of one spec must have in common to share a codebook, and to share a decoder."""
        (codebook,) = _shared((matrix,), self.codebook_scope)
        (decoder,) = _shared((matrix,), self.config.decoder_scope)
        return codebook, decoder

    def codebook_bits(self, spec: Spec) -> int:
        """Stored bits of a codebook."""
        stored = self.config.codec.codebook_source != "seed"
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
        row_scale, matrices = self.config.codec.row_scale, self.matrices
        specs = [self.specs[m.name] for m in matrices]
        # The search for a plan comes here tens of thousands of times: pairs in place of the text of the keys.
        codebooks = list(zip(specs, _shared(matrices, self.codebook_scope), strict=True))
        decoders = zip(codebooks, _shared(matrices, self.config.decoder_scope), strict=True)
        lengths = Counter(spec.vector_len for (spec, _), _ in set(decoders))
        return {
            "indices": sum(m.own_bits(spec, False) for m, spec in zip(matrices, specs, strict=True)),
            "row_scales": sum(ROW_SCALE_BITS * m.rows for m in matrices) if row_scale else 0,
            "codebooks": sum(self.codebook_bits(spec) for spec, _ in set(codebooks)),
            "decoders": sum(
                count * self.config.codec_for(length).decoder_bits for length, count in lengths.items()
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


def _codebook_key(matrix: Matrix, spec: Spec, scope: str) -> str:
    (shared,) = _shared((matrix,), scope)
    overlap = f"+{spec.stride}" if spec.stride else ""
    overlap += f"/{spec.window}" if spec.window else ""
    return f"{spec.vector_len}x{spec.codebook_size}{overlap}|{shared}"


def _shared(matrices: tuple[Matrix, ...], scope: str) -> list[str]:
    """What the matrices that share a codebook or decoder have in common: `matrix`, `kind` or `model`."""
    if scope == "model":
        return [""] * len(matrices)
    return [m.name if scope == "matrix" else m.kind for m in matrices]
