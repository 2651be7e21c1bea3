"""Calibrated coding of a model: embedding and head first, then block after block for what each is fed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from pocketllm.codec.feedback import HessianFactor, factorize
from pocketllm.codec.rotation import rotate_hessian
from pocketllm.model.blocks import BlockStream, block_list
from pocketllm.model.compute import abreast
from pocketllm.model.encode import Encoder
from pocketllm.model.inputs import Inputs
from pocketllm.model.plan import Matrix, Plan
from pocketllm.model.sensitivity import OUTPUT_DAMPING, Sensitivity, output_hessians

Progress = Callable[[float, str], None]


def encode_calibrated(
    encoder: Encoder,
    windows: Tensor,
    sensitivity: Sensitivity,
    progress: Progress,
    kept: Path | None = None,
    token_weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Code embedding and head, then block after block for its inputs.

    Args:
        windows: [N, context] token ids of the calibration text.
        token_weights: [N, context] by matrix, see `BlockStream.inputs`.
        kept: folder in which an earlier run left what blocks of the dense model see; see `_for_dense`.
    """
    settings = encoder.plan.config.calibration
    assert settings is not None
    for matrix in encoder.plan.matrices:
        if not matrix.in_blocks:
            progress(encoder.share, matrix.name)
            _encode_end(encoder, matrix, sensitivity)
    if settings.sequential:
        _in_sequence(encoder, windows, progress, settings.refine_epochs > 0, token_weights)
    else:
        _for_dense(encoder, windows, progress, settings.refine_epochs > 0, kept, token_weights)


def _in_sequence(
    encoder: Encoder,
    windows: Tensor,
    progress: Progress,
    refines: bool,
    token_weights: Mapping[str, Tensor] | None,
) -> None:
    """Every block for the inputs that it gets from the coded ones before it."""
    ends = {m.name: encoder.decoded(m) for m in encoder.plan.matrices if not m.in_blocks}
    stream = BlockStream(encoder.source, windows, encoder.device, coded=ends)
    targets = BlockStream(encoder.source, windows, encoder.device).hidden if refines else []
    for number, (path, block) in enumerate(stream):
        inside = _inside(encoder.plan, path)
        see = partial(stream.inputs, block, inside, token_weights)
        _encode_block(encoder, path, inside, see, progress)
        if refines:
            targets = stream.run(block, targets)
            progress(encoder.share, f"{path}: refinement")
            encoder.refine(number, f"{path}.", block, inside, stream, targets)
        encoder.install(number, inside, stream)
        stream.hidden = stream.run(block, stream.hidden)


def _for_dense(
    encoder: Encoder,
    windows: Tensor,
    progress: Progress,
    refines: bool,
    kept: Path | None,
    token_weights: Mapping[str, Tensor] | None,
) -> None:
    """Every block for the inputs that it has in the dense model.

    What blocks see then depends on model and text alone. It is kept in the folder `kept`; a run at another
    target finds it there and need not run the model at all, unless it refines.
    """
    list_path, blocks = block_list(encoder.source.model)
    files = {}
    if kept is not None:
        files = {f"{list_path}.{n}": kept / f"{list_path}.{n}.safetensors" for n in range(len(blocks))}

    def see(path: str, measured: Callable[[], Inputs]) -> Inputs:
        if path in files and files[path].is_file():
            return Inputs.load(files[path], encoder.device)
        found = measured()
        if path in files:
            found.save(files[path])
        return found

    if files and not refines and all(file.is_file() for file in files.values()):
        for path, file in files.items():
            inside = _inside(encoder.plan, path)
            _encode_block(encoder, path, inside, partial(Inputs.load, file, encoder.device), progress)
        return
    stream = BlockStream(encoder.source, windows, encoder.device)
    for number, (path, block) in enumerate(stream):
        inside = _inside(encoder.plan, path)
        seen = partial(see, path, partial(stream.inputs, block, inside, token_weights))
        _encode_block(encoder, path, inside, seen, progress)
        outputs = stream.run(block, stream.hidden)
        if refines:
            progress(encoder.share, f"{path}: refinement")
            encoder.refine(number, f"{path}.", block, inside, stream, outputs)
        stream.hidden = outputs


def _inside(plan: Plan, path: str) -> list[Matrix]:
    return [m for m in plan.matrices if m.name.startswith(f"{path}.")]


def _encode_block(
    encoder: Encoder, path: str, inside: list[Matrix], see: Callable[[], Inputs], progress: Progress
) -> None:
    """Code the matrices of a block; `see` tells their inputs, and is not asked if all are coded already."""
    if all(encoder.done(m) for m in inside):
        encoder.passed += sum(m.weights for m in inside)
        return
    progress(encoder.share, f"{path}: inputs")
    inputs = see()
    after = output_hessians(encoder.outputs, path, encoder.device)

    def code(matrix: Matrix, factor: HessianFactor) -> None:
        outputs = _output_factor(matrix, after.get(matrix.name), encoder.plan)
        encoder.with_feedback(matrix, factor, inputs, outputs=outputs)

    jobs = [partial(code, *pair) for pair in _factors(inside, inputs, encoder.plan)]
    for number, _ in enumerate(abreast(jobs, encoder.device)):
        progress(encoder.share, inside[number].name)
        encoder.passed += inside[number].weights


def _encode_end(encoder: Encoder, matrix: Matrix, sensitivity: Sensitivity) -> None:
    """Embedding or head: errors cost what the head makes of them, and alike where rows are looked up."""
    head, share = sensitivity.head_hessian.to(encoder.device), sensitivity.head_share[matrix.name]
    hessian = share * head / head.diagonal().mean()
    hessian.diagonal().add_(1 - share)
    rows = sensitivity.row_importance[matrix.name].to(encoder.device)
    encoder.with_feedback(matrix, _factor(matrix, hessian, encoder.plan), row_importance=rows)
    encoder.passed += matrix.weights


def _factors(matrices: list[Matrix], inputs: Inputs, plan: Plan) -> Iterator[tuple[Matrix, HessianFactor]]:
    """Each matrix with the factor of its Hessian, computed once for matrices that share inputs and d."""
    kept: dict[tuple[int, int], HessianFactor] = {}
    for matrix in matrices:
        hessian = inputs.hessians[matrix.name]
        key = id(hessian), plan.specs[matrix.name].vector_len
        if key not in kept:
            kept[key] = _factor(matrix, hessian, plan)
        yield matrix, kept[key]


def _factor(matrix: Matrix, hessian: Tensor, plan: Plan) -> HessianFactor:
    """The factor of a matrix's Hessian [columns, columns], which is rotated as the matrix is."""
    settings, seed = plan.config.calibration, plan.rotation(matrix)[1]
    assert settings is not None
    rotated = hessian if seed is None else rotate_hessian(hessian, seed)
    return factorize(rotated, plan.specs[matrix.name].vector_len, settings.damping)


def _output_factor(matrix: Matrix, hessian: Tensor | None, plan: Plan) -> HessianFactor | None:
    """The factor of the Hessian [rows, rows] of a matrix's outputs, which is rotated as the matrix is."""
    seed = plan.rotation(matrix)[0]
    if hessian is None:
        return None
    return factorize(hessian if seed is None else rotate_hessian(hessian, seed), 1, OUTPUT_DAMPING)
