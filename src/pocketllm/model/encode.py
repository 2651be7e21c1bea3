"""Choose the indices of every matrix, and keep each finished one in the workspace.

Without calibration matrices are coded one by one for the least error of their weights. With it they are coded
block by block, in the model's order, for the least error of what each layer computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pocketllm.codec.feedback import HessianFactor, assign, factorize
from pocketllm.codec.matrix_codec import EncodedMatrix, MatrixCodec
from pocketllm.codec.normalization import row_rms
from pocketllm.codec.rotation import rotate_hessian, rotate_matrix, unrotate_matrix
from pocketllm.model.calibration import BlockStream
from pocketllm.model.layers import fold
from pocketllm.model.plan import Matrix, Plan
from pocketllm.model.sensitivity import Sensitivity
from pocketllm.model.source import DenseCheckpoint
from pocketllm.model.workspace import Workspace
from pocketllm.model.write import matrix_unit

CodecOf = Callable[[Matrix], MatrixCodec]
Progress = Callable[[float, str], None]


class Encoder:
    """Codes matrices of one model into a workspace; what is there already is not coded again."""

    def __init__(
        self, work: Workspace, source: DenseCheckpoint, plan: Plan, codec_of: CodecOf, device: str
    ) -> None:
        self.work, self.source, self.plan = work, source, plan
        self.codec_of, self.device = codec_of, device

    def nearest(self, matrix: Matrix) -> None:
        """Nearest codewords."""
        if not self.done(matrix):
            weight = self._weight(matrix)
            self._keep(matrix, weight, self.codec_of(matrix).encode(weight), None)

    def with_feedback(
        self, matrix: Matrix, factor: HessianFactor, row_importance: Tensor | None = None
    ) -> None:
        """Indices for inputs of a given (rotated) Hessian; row_importance: [rows], see `assign`."""
        if self.done(matrix):
            return
        settings = self.plan.config.calibration
        assert settings is not None
        weight = self._weight(matrix)
        table = self.codec_of(matrix).decoded_codebook()
        trellis = self.plan.specs[matrix.name].form.trellis
        indices, scale = assign(
            weight, factor, table, row_rms(weight), settings.passes, trellis, row_importance
        )
        self._keep(matrix, weight, EncodedMatrix(indices, scale.bfloat16(), matrix.columns), factor)

    def decoded(self, matrix: Matrix) -> Tensor:
        """What a coded matrix will be when it is loaded: [rows, columns] float32."""
        tensors, _ = self.work.load(matrix_unit(self.plan, matrix))
        spec = self.plan.specs[matrix.name]
        per_row = matrix.subvectors(spec.vector_len) // matrix.rows
        encoded = EncodedMatrix(
            spec.form.unpack(tensors["indices"], matrix.rows, per_row).long().to(self.device),
            tensors["row_scale"].to(self.device),
            matrix.columns,
        )
        return unrotate_matrix(self.codec_of(matrix).decode(encoded), self.plan.rotation(matrix))

    def done(self, matrix: Matrix) -> bool:
        """Whether a matrix is coded already."""
        return self.work.has(matrix_unit(self.plan, matrix))

    def _weight(self, matrix: Matrix) -> Tensor:
        """The matrix as it is coded: folded, rotated, float32."""
        weight = fold(self.source.read(matrix.name), matrix.transposed).to(self.device)
        return rotate_matrix(weight, self.plan.rotation(matrix))

    def _keep(
        self, matrix: Matrix, weight: Tensor, encoded: EncodedMatrix, factor: HessianFactor | None
    ) -> None:
        size = self.plan.specs[matrix.name].codebook_size
        flat = encoded.indices.reshape(-1)
        error = weight - self.codec_of(matrix).decode(encoded)
        facts = {"nmse": _share(error.square().sum(), weight.square().sum())}
        if factor is not None:
            hessian = factor.hessian[: matrix.columns, : matrix.columns]
            loss, energy = (((x @ hessian) * x).sum() for x in (error, weight))
            facts["proxy_error"] = _share(loss, energy)
        tensors = {
            "indices": self.plan.specs[matrix.name].form.pack(encoded.indices),
            "row_scale": encoded.row_scale,
            "counts": torch.bincount(flat, minlength=size).to(torch.int32),
        }
        if not self.plan.config.codec.row_scale:
            del tensors["row_scale"]
        self.work.save(matrix_unit(self.plan, matrix), tensors, facts)


def _share(part: Tensor, whole: Tensor) -> float:
    return float(part.double() / whole.double()) if float(whole) > 0 else 0.0


def encode_calibrated(
    encoder: Encoder, windows: Tensor, sensitivity: Sensitivity, progress: Progress
) -> None:
    """Code embedding and head, then block after block for its inputs.

    Args:
        windows: [N, context] token ids of the calibration text.
    """
    plan = encoder.plan
    done = 0
    for matrix in plan.matrices:
        if not matrix.in_blocks:
            progress(done / plan.weights, matrix.name)
            _encode_end(encoder, matrix, sensitivity)
            done += matrix.weights
    ends = {m.name: encoder.decoded(m) for m in plan.matrices if not m.in_blocks}
    stream = BlockStream(encoder.source, windows, encoder.device, coded=ends)
    for path, block in stream:
        inside = [m for m in plan.matrices if m.name.startswith(f"{path}.")]
        if any(not encoder.done(m) for m in inside):
            progress(done / plan.weights, f"{path}: inputs")
            hessians = stream.hessians(path, block, inside)
            for matrix, factor in _factors(inside, hessians, plan):
                progress(done / plan.weights, matrix.name)
                encoder.with_feedback(matrix, factor)
                done += matrix.weights
        for matrix in inside:
            decoded = encoder.decoded(matrix)
            value = decoded.T if matrix.transposed else decoded.reshape(matrix.shape)
            stream.set_weight(matrix.name, value)
        stream.hidden = stream.run(block)


def _encode_end(encoder: Encoder, matrix: Matrix, sensitivity: Sensitivity) -> None:
    """Embedding or head: errors cost what the head makes of them, and alike where rows are looked up."""
    settings = encoder.plan.config.calibration
    assert settings is not None
    head, share = sensitivity.head_hessian.to(encoder.device), sensitivity.head_share[matrix.name]
    hessian = share * head / head.diagonal().mean()
    hessian.diagonal().add_(1 - share)
    seed = encoder.plan.rotation(matrix)[1]
    rotated = hessian if seed is None else rotate_hessian(hessian, seed)
    factor = factorize(rotated, encoder.plan.specs[matrix.name].vector_len, settings.damping)
    encoder.with_feedback(matrix, factor, sensitivity.row_importance[matrix.name].to(encoder.device))


def _factors(
    matrices: list[Matrix], hessians: dict[str, Tensor], plan: Plan
) -> Iterator[tuple[Matrix, HessianFactor]]:
    """Each matrix with the factor of its Hessian, computed once for matrices that share inputs and d.

    A matrix whose inputs were not seen is coded for inputs that are all alike.
    """
    settings = plan.config.calibration
    assert settings is not None
    kept: dict[tuple[int, int], HessianFactor] = {}
    for matrix in matrices:
        hessian = hessians.get(matrix.name)
        if hessian is None:
            hessian = torch.eye(matrix.columns)
            hessians[matrix.name] = hessian
        key = id(hessian), plan.specs[matrix.name].vector_len
        if key not in kept:
            seed = plan.rotation(matrix)[1]
            rotated = hessian if seed is None else rotate_hessian(hessian, seed)
            kept[key] = factorize(rotated, key[1], settings.damping)
        yield matrix, kept[key]
