"""Choose the indices of a matrix, and keep each finished one in the workspace.

Without calibration: for the least error of its weights. With it: for the least error of what its layer
computes; `blockwise.py` says in which order and for which inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from pocketllm.codec.feedback import HessianFactor, assign
from pocketllm.codec.matrix_codec import EncodedMatrix, MatrixCodec
from pocketllm.codec.normalization import row_rms
from pocketllm.codec.rotation import rotate_matrix, unrotate_matrix
from pocketllm.errors import WeightError
from pocketllm.model.blocks import BlockStream
from pocketllm.model.inputs import Inputs
from pocketllm.model.layers import fold, unfold
from pocketllm.model.plan import Matrix, Plan
from pocketllm.model.refine import Coded, refine_block
from pocketllm.model.source import DenseCheckpoint
from pocketllm.model.units import matrix_unit, refined_unit
from pocketllm.model.workspace import Workspace

CodecOf = Callable[[Matrix], MatrixCodec]


class Encoder:
    """Codes matrices of one model into a workspace; what is there already is not coded again."""

    def __init__(
        self,
        work: Workspace,
        source: DenseCheckpoint,
        plan: Plan,
        codec_of: CodecOf,
        device: str,
        outputs: Path | None = None,
    ) -> None:
        self.work, self.source, self.plan = work, source, plan
        self.codec_of, self.device = codec_of, device
        self.outputs = outputs  # folder of the Hessians of layers' outputs
        self.by_name = {m.name: m for m in plan.matrices}
        self.scales: dict[str, Tensor] = {}  # refined row scales
        self.passed = 0  # weights of the matrices that are dealt with

    @property
    def share(self) -> float:
        """Of the weights: how many are dealt with."""
        return self.passed / self.plan.weights

    def nearest(self, matrix: Matrix) -> None:
        """Nearest codewords."""
        if not self.done(matrix):
            weight = self._weight(matrix)
            self._keep(matrix, weight, self.codec_of(matrix).encode(weight), None)

    def with_feedback(
        self,
        matrix: Matrix,
        factor: HessianFactor,
        inputs: Inputs | None = None,
        row_importance: Tensor | None = None,
        outputs: HessianFactor | None = None,
    ) -> None:
        """Indices for inputs of a given (rotated) Hessian.

        Args:
            inputs: that it was taken from, for the report. row_importance, outputs: see `assign`.
        """
        if self.done(matrix):
            return
        settings = self.plan.config.calibration
        assert settings is not None
        weight = self._weight(matrix)
        table = self.codec_of(matrix).decoded_codebook()
        trellis = matrix.form(self.plan.specs[matrix.name]).trellis
        indices, scale = assign(
            *(weight, factor, table, row_rms(weight), settings.passes, trellis),
            *(row_importance, outputs, matrix.strip_rows),
        )
        encoded = EncodedMatrix(indices, scale.bfloat16(), matrix.columns)
        self._keep(matrix, weight, encoded, factor, inputs)

    def refine(
        self,
        number: int,
        prefix: str,
        block: nn.Module,
        matrices: list[Matrix],
        stream: BlockStream,
        targets: list[Tensor],
    ) -> None:
        """Tune a block whose matrices are all coded; see `refine_block`."""
        if self.work.has(refined_unit(number)):
            return
        settings = self.plan.config.calibration
        assert settings is not None
        coded = {m.name: self._coded(m) for m in matrices}
        found = refine_block(block, prefix, coded, stream.hidden, targets, stream.call, settings)
        tensors = {f"row_scale|{name}": value for name, value in found.row_scale.items()}
        for name, pair in found.decoders.items():
            tensors |= {f"up|{name}": pair[0], f"down|{name}": pair[1]}
        for name, value in found.vectors.items():
            tensors[f"vector|{name}"] = value.to(self.source.dtype(name))
        self.work.save(refined_unit(number), tensors, {"before": found.before, "after": found.after})

    def install(self, number: int, matrices: list[Matrix], stream: BlockStream) -> None:
        """Put what will be stored into the block: decoded matrices, refined vectors."""
        if self.work.has(refined_unit(number)):
            tensors, _ = self.work.load(refined_unit(number))
            for key, value in tensors.items():
                kind, _, name = key.partition("|")
                if kind == "vector":
                    stream.set_weight(name, value)
                elif kind == "row_scale":
                    self.scales[name] = value
                elif kind == "up":
                    self.codec_of(self.by_name[name]).decoder.set_weights(value, tensors[f"down|{name}"])
        for matrix in matrices:
            stream.set_weight(matrix.name, unfold(self.decoded(matrix), matrix))

    def _coded(self, matrix: Matrix) -> Coded:
        encoded = self._encoded(matrix)
        shared = [m for m in self.plan.matrices if self.plan.decoder_key(m) == self.plan.decoder_key(matrix)]
        return Coded(
            encoded.indices.to(torch.int32),
            encoded.row_scale.float(),
            self.codec_of(matrix),
            len(shared) == 1,
            matrix.columns,
            self.plan.rotation(matrix),
            partial(unfold, entry=matrix),
        )

    def decoded(self, matrix: Matrix) -> Tensor:
        """What a coded matrix will be when it is loaded: [rows, columns] float32."""
        decoded = self.codec_of(matrix).decode(self._encoded(matrix))
        return unrotate_matrix(decoded, self.plan.rotation(matrix))

    def _encoded(self, matrix: Matrix) -> EncodedMatrix:
        """A finished matrix, with its refined scale if there is one."""
        tensors, _ = self.work.load(matrix_unit(self.plan, matrix))
        spec = self.plan.specs[matrix.name]
        per_row = matrix.subvectors(spec.vector_len) // matrix.rows
        return EncodedMatrix(
            matrix.form(spec).unpack(tensors["indices"], matrix.rows, per_row).long().to(self.device),
            self.scales.get(matrix.name, tensors["row_scale"]).to(self.device),
            matrix.columns,
        )

    def done(self, matrix: Matrix) -> bool:
        """Whether a matrix is coded already."""
        return self.work.has(matrix_unit(self.plan, matrix))

    def _weight(self, matrix: Matrix) -> Tensor:
        """The matrix as it is coded: folded, rotated, float32."""
        weight = fold(self.source.read(matrix.name), matrix.transposed).to(self.device)
        return rotate_matrix(weight, self.plan.rotation(matrix))

    def _keep(
        self,
        matrix: Matrix,
        weight: Tensor,
        encoded: EncodedMatrix,
        factor: HessianFactor | None,
        inputs: Inputs | None = None,
    ) -> None:
        size = self.plan.specs[matrix.name].codebook_size
        flat = encoded.indices.reshape(-1)
        error = weight - self.codec_of(matrix).decode(encoded)
        facts: dict[str, float] = {"nmse": _share(_energy(error), _energy(weight))}
        if not math.isfinite(facts["nmse"]):
            raise WeightError(
                f"{matrix.name}: decodes to values that are no numbers (beyond what float16 holds); "
                "store a row scale, or leave the matrix dense"
            )
        if factor is not None:
            hessian = factor.hessian[: matrix.columns, : matrix.columns]
            loss, energy = (((x @ hessian) * x).sum() for x in (error, weight))
            facts["proxy_error"] = _share(loss, energy)
        if inputs is not None:
            facts["input_tokens"] = inputs.tokens[matrix.name]
            facts["unseen_experts"] = inputs.unseen_experts.get(matrix.name, 0)
        tensors = {
            "indices": matrix.form(self.plan.specs[matrix.name]).pack(encoded.indices),
            "row_scale": encoded.row_scale,
            "counts": torch.bincount(flat, minlength=size).to(torch.int32),
        }
        if not self.plan.config.codec.row_scale:
            del tensors["row_scale"]
        self.work.save(matrix_unit(self.plan, matrix), tensors, facts)


def _energy(x: Tensor) -> Tensor:
    """Sum of squares; in float64 where those of tiny numbers vanish in float32."""
    total = x.square().sum()
    return total if total > torch.finfo(torch.float32).tiny else x.double().square().sum()


def _share(part: Tensor, whole: Tensor) -> float:
    return 0.0 if float(whole) == 0 else float(part.double() / whole.double())
