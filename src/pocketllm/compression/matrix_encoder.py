"""Encode the matrices of a model, and keep each finished one in the workspace.

`encode_blocks.py` defines the order of encoding with calibration, and the inputs that each matrix is encoded for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from pocketllm.calibrate.activations import Activations
from pocketllm.calibrate.blocks import BlockStream
from pocketllm.calibrate.input_hessians import Inputs
from pocketllm.codec.hessian import Hessian
from pocketllm.codec.index_form import IndexForm
from pocketllm.codec.matrix_codec import EncodedMatrix, MatrixCodec
from pocketllm.codec.rotation import rotate_matrix
from pocketllm.codec.subvectors import fold, strip_lengths, subvectors_per_row, unfold
from pocketllm.compression.refine import EncodedParameter, refine_block
from pocketllm.errors import WeightError
from pocketllm.format.mapped_pages import drop_files
from pocketllm.format.workspace import Workspace
from pocketllm.plan.matrices import Matrix, Plan
from pocketllm.source.dense_checkpoint import DenseCheckpoint

LARGE_WEIGHTS = 1 << 25
"""Weights of a matrix from which on it is encoded in groups of rows, if its rows do not depend on each other."""
GROUP_WEIGHTS = 1 << 23
"""Weights of such a group."""


@dataclass(frozen=True)
class _EncodedRows:
    """Some rows of an encoded matrix. sums: (error, energy) of the weights, and with a Hessian of the outputs."""

    stream: Tensor
    row_scale: Tensor
    counts: Tensor
    sums: list[tuple[Tensor, Tensor]]


class MatrixEncoder:
    """Encodes matrices of one model into a workspace; finished ones are not encoded again.

    Set by the caller: codecs, fitted, by decoder key. at_once: matrices of a block that are encoded at once, 0 for as
    many as there are threads. activations: folder for those of all windows, None for in memory. targets: weights to
    encode in place of the dense ones, by name.
    """

    def __init__(
        self, work: Workspace, source: DenseCheckpoint, plan: Plan, device: str, outputs: Path | None = None
    ) -> None:
        self.work, self.source, self.plan, self.device = work, source, plan, device
        self.outputs = outputs  # folder of the Hessians of layers' outputs
        self.codecs: dict[str, MatrixCodec] = {}
        self.by_name = {m.name: m for m in plan.matrices}
        self.scales: dict[str, Tensor] = {}  # refined row scales
        self.targets: dict[str, Tensor] = {}
        self.activations: Path | None = None
        self.at_once = self.passed = 0  # passed: weights of the finished matrices

    @property
    def share(self) -> float:
        """Finished share of the weights."""
        return self.passed / self.plan.weights

    def codec(self, matrix: Matrix) -> MatrixCodec:
        """The fitted codec of a matrix."""
        return self.codecs[self.plan.decoder_key(matrix)]

    def encode(
        self,
        matrix: Matrix,
        hessian: Hessian | None = None,
        outputs: Hessian | None = None,
        *,
        inputs: Inputs | None = None,
        row_importance: Tensor | None = None,
    ) -> None:
        """Encode a matrix and keep it, unless it is already encoded.

        Args:
            hessian, outputs, row_importance: see `MatrixCodec.encode`.
            inputs: those behind the Hessian, for the report.
        """
        if self.done(matrix):
            return
        settings = self.plan.config.calibration
        weight = self.source.read(matrix.name)
        target = fold(self.targets.get(matrix.name, weight), matrix.transposed)
        weight = fold(weight, matrix.transposed)
        rotation, found, form = self.plan.rotation(matrix), list[_EncodedRows](), self._form(matrix)
        for rows in row_groups(matrix, form, is_whole=outputs is not None or rotation[0] is not None):
            part = weight[rows].to(self.device)
            drop_files(self.source.files)
            encoded = self.codec(matrix).encode(
                target[rows].to(self.device),
                hessian,
                outputs,
                form=form,
                rotation=rotation,
                row_importance=None if row_importance is None else row_importance[rows],
                passes=settings.passes if settings else 0,
            )
            found.append(self._measured(matrix, part, encoded, hessian))
        self._keep(matrix, found, inputs)

    def refine(
        self,
        number: int,
        prefix: str,
        block: nn.Module,
        matrices: list[Matrix],
        stream: BlockStream,
        targets: Activations,
    ) -> None:
        """Tune a block whose matrices are all encoded; see `refine_block`."""
        if self.work.has(refined_unit(number)):
            return
        settings = self.plan.config.calibration
        assert settings is not None
        encoded = {m.name: self._for_refinement(m) for m in matrices}
        found = refine_block(block, prefix, encoded, stream.hidden, targets, stream.call, settings)
        tensors = {f"row_scale|{name}": value for name, value in found.row_scale.items()}
        for name, pair in found.decoders.items():
            tensors |= {f"up|{name}": pair[0], f"down|{name}": pair[1]}
        for name, value in found.vectors.items():
            tensors[f"vector|{name}"] = value.to(self.source.dtype(name))
        self.work.save(refined_unit(number), tensors, {"before": found.before, "after": found.after})

    def install(self, number: int, matrices: list[Matrix], stream: BlockStream) -> None:
        """Load the values that will be stored into the block: decoded matrices, refined vectors."""
        if self.work.has(refined_unit(number)):
            tensors, _ = self.work.load(refined_unit(number))
            for key, value in tensors.items():
                kind, _, name = key.partition("|")
                if kind == "vector":
                    stream.set_weight(name, value)
                elif kind == "row_scale":
                    self.scales[name] = value
                elif kind == "up":
                    self.codec(self.by_name[name]).decoder.set_weights(value, tensors[f"down|{name}"])
        for matrix in matrices:
            stream.set_weight(matrix.name, unfold(self.decoded(matrix), matrix))

    def _for_refinement(self, matrix: Matrix) -> EncodedParameter:
        encoded, codec = self._encoded(matrix), self.codec(matrix)
        shared = [m for m in self.plan.matrices if self.plan.decoder_key(m) == self.plan.decoder_key(matrix)]
        return EncodedParameter(
            indices=encoded.indices(codec.config.vector_len),
            row_scale=encoded.row_scale.float(),
            codec=codec,
            form=encoded.form,
            tunes_decoder=len(shared) == 1,
            columns=matrix.columns,
            rotation=encoded.rotation,
            unfold=partial(unfold, entry=matrix),
        )

    def decoded(self, matrix: Matrix) -> Tensor:
        """An encoded matrix as it will be loaded: [rows, columns] float32."""
        return self.codec(matrix).decode(self._encoded(matrix))

    def outside(self, name: str, rows: Tensor | None) -> Tensor | None:
        """A weight outside the blocks as it will be loaded, or some of its rows; None if it is not compressed."""
        matrix = self.by_name.get(name)
        if matrix is None or matrix.in_blocks:
            return None
        if rows is None or self.plan.rotation(matrix)[0] is not None:
            found = unfold(self.decoded(matrix), matrix)
            return found if rows is None else found[rows]
        return self._decoded_rows(matrix, rows)

    def _decoded_rows(self, matrix: Matrix, rows: Tensor) -> Tensor:
        """Rows of a decoded matrix whose columns are not rotated, float32; one group at a time is decoded."""
        encoded, codec, found, begin = self._encoded(matrix), self.codec(matrix), list[Tensor](), 0
        per_row = subvectors_per_row(matrix.columns, codec.config.vector_len)
        for group in row_groups(matrix, encoded.form):
            scale = encoded.row_scale[group]
            end = begin + encoded.form.nbytes(len(scale), per_row)
            part = replace(encoded, stream=encoded.stream[begin:end], row_scale=scale)
            begin, wanted = end, rows[(rows >= group.start) & (rows < group.stop)] - group.start
            if len(wanted):
                found.append(codec.decode(part)[wanted.to(self.device)])
        return torch.cat(found)

    def _encoded(self, matrix: Matrix) -> EncodedMatrix:
        """A finished matrix, with its refined row scale if there is one."""
        tensors, _ = self.work.load(matrix_unit(self.plan, matrix))
        return EncodedMatrix(
            tensors["indices"].to(self.device),
            self.scales.get(matrix.name, tensors["row_scale"]).to(self.device),
            matrix.columns,
            self._form(matrix),
            self.plan.rotation(matrix),
        )

    def _form(self, matrix: Matrix) -> IndexForm:
        return matrix.form(self.plan.specs[matrix.name])

    def done(self, matrix: Matrix) -> bool:
        """Whether a matrix is already encoded."""
        return self.work.has(matrix_unit(self.plan, matrix))

    def _measured(
        self, matrix: Matrix, weight: Tensor, encoded: EncodedMatrix, hessian: Hessian | None
    ) -> _EncodedRows:
        """Encoded rows of a matrix with their errors and their codeword usage."""
        codec, rotation = self.codec(matrix), encoded.rotation
        rotated = rotate_matrix(weight, rotation)
        error = rotated - codec.decode(encoded, rotated=True)
        sums = [(_energy(error), _energy(rotated))]
        if hessian is not None:
            factor = hessian.factor(rotation[1], codec.config.vector_len)
            h = factor.hessian[: matrix.columns, : matrix.columns]
            loss, energy = (((x @ h) * x).sum() for x in (error, rotated))
            sums.append((loss, energy))
        used = encoded.form.codewords(encoded.indices(codec.config.vector_len).reshape(-1))
        counts = torch.bincount(used, minlength=encoded.form.codebook_size)
        return _EncodedRows(encoded.stream, encoded.row_scale, counts, sums)

    def _keep(self, matrix: Matrix, found: list[_EncodedRows], inputs: Inputs | None) -> None:
        """Write an encoded matrix, its errors and its codeword usage into the workspace."""
        ratios = [
            _ratio(_total([part for part, _ in pairs]), _total([total for _, total in pairs]))
            for pairs in zip(*(rows.sums for rows in found), strict=True)
        ]
        facts: dict[str, float] = {"nmse": ratios[0]}
        if not math.isfinite(facts["nmse"]):
            raise WeightError(
                f"{matrix.name}: decodes to non-finite values (beyond what float16 holds); "
                "store a row scale, or leave the matrix dense"
            )
        if len(ratios) > 1:
            facts["proxy_error"] = ratios[1]
        if inputs is not None:
            facts["input_tokens"] = inputs.tokens[matrix.name]
            facts["unseen_experts"] = inputs.unseen_experts.get(matrix.name, 0)
        tensors = {
            "indices": torch.cat([rows.stream for rows in found]),
            "row_scale": torch.cat([rows.row_scale for rows in found]),
            "counts": torch.stack([rows.counts for rows in found]).sum(dim=0).to(torch.int32),
        }
        if not self.plan.config.codec.row_scale:
            del tensors["row_scale"]
        self.work.save(matrix_unit(self.plan, matrix), tensors, facts)


def row_groups(matrix: Matrix, form: IndexForm, is_whole: bool = False) -> list[slice]:
    """Runs of strips of a matrix that are encoded one after another, so that memory does not grow with its rows.

    Strips do not depend on each other, and each run has the strips that it has in the matrix. Its indices end on a
    byte: those of each strip on a trellis do, independent ones after a multiple of eight rows.

    Args:
        is_whole: the rows depend on each other after all.
    """
    lengths = strip_lengths(matrix.rows, matrix.strip_rows)
    most = max(1, GROUP_WEIGHTS // (max(lengths) * matrix.columns))
    if is_whole or matrix.weights <= LARGE_WEIGHTS:
        return [slice(0, matrix.rows)]
    ends = [sum(lengths[: first + most]) for first in range(0, len(lengths), most)]
    if form.strips(matrix.rows) == 1:
        ends = [*(end // 8 * 8 for end in ends[:-1]), matrix.rows]
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def _total(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).double().sum()


def _energy(x: Tensor) -> Tensor:
    """Sum of squares; in float64 where those of tiny numbers vanish in float32."""
    total = x.square().sum()
    return total if total > torch.finfo(torch.float32).tiny else x.double().square().sum()


def _ratio(part: Tensor, total: Tensor) -> float:
    return 0.0 if float(total) == 0 else float(part.double() / total.double())


def matrix_unit(plan: Plan, matrix: Matrix) -> str:
    """File name of an encoded matrix in the workspace."""
    return f"matrix-{plan.matrices.index(matrix):05d}.safetensors"


def refined_unit(number: int) -> str:
    """File name of what refinement changed in a block, in the workspace."""
    return f"refined-{number:05d}.safetensors"


def codebook_unit(number: int) -> str:
    """File name of a fitted codebook with its networks in the workspace."""
    return f"codebook-{number:05d}.safetensors"
