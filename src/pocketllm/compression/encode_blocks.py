"""Encode a model with calibration: embedding and head first, then one block after another for its inputs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pocketllm.calibrate.activations import Activations
from pocketllm.calibrate.blocks import BlockStream, block_list
from pocketllm.calibrate.embedding_cost import end_hessian
from pocketllm.calibrate.input_hessians import Inputs
from pocketllm.calibrate.sensitivity import Sensitivity
from pocketllm.codec.hessian import Hessian
from pocketllm.compression.block_hessians import hessians_of_inputs, hessians_of_outputs
from pocketllm.compression.compensate import COMPENSATE_TOKENS, compensated, compensated_unit, groups_in_order
from pocketllm.compression.matrix_encoder import MatrixEncoder, matrix_unit, refined_unit
from pocketllm.compression.matrix_jobs import most_parallel, run_parallel
from pocketllm.format.kept import is_intact
from pocketllm.format.mapped_pages import return_freed
from pocketllm.plan.matrices import Matrix, Plan
from pocketllm.ranks import SOLO, Ranks

Progress = Callable[[float, str], None]


def encode_calibrated(
    encoder: MatrixEncoder,
    windows: Tensor,
    sensitivity: Sensitivity,
    progress: Progress,
    kept: Path | None = None,
    token_weights: Mapping[str, Tensor] | None = None,
    ranks: Ranks = SOLO,
) -> None:
    """Encode towers (without calibration), embedding and head, then one block after another for its inputs.

    Args:
        windows: [N, context] token ids of the calibration text.
        token_weights: [N, context] by matrix, see `BlockStream.inputs`.
        kept: folder with the Hessians of the dense model's inputs from an earlier run; see `_on_dense_inputs`.
        ranks: that encode together. Each has all matrices afterwards if blocks are encoded for the outputs of encoded
            blocks, otherwise only those of its own.
    """
    settings = encoder.plan.config.calibration
    assert settings is not None
    refines, ends = settings.refine_epochs > 0, [m for m in encoder.plan.matrices if not _is_inside(m)]
    if settings.sequential:
        _encode_ends(encoder, ranks.mine(_left(encoder, ends, ranks), _weights), sensitivity, progress)
        _share(encoder, ends, ranks)
        encoder.passed = sum(map(_weights, ends))
        _on_compressed_inputs(encoder, windows, progress, refines, token_weights, ranks)
        return
    path, blocks = block_list(encoder.source.model)
    units = [ends, *(_inside(encoder.plan, f"{path}.{number}") for number in range(len(blocks)))]
    owners = ranks.split([sum(map(_weights, _left(encoder, unit, ranks))) for unit in units])
    own = {f"{path}.{number}" for number, owner in enumerate(owners[1:]) if owner == ranks.rank}
    if owners[0] == ranks.rank:
        _encode_ends(encoder, ends, sensitivity, progress)
    encoder.passed = sum(map(_weights, ends))
    _on_dense_inputs(encoder, windows, progress, refines, kept, token_weights, own)


def _on_compressed_inputs(
    encoder: MatrixEncoder,
    windows: Tensor,
    progress: Progress,
    refines: bool,
    token_weights: Mapping[str, Tensor] | None,
    ranks: Ranks,
) -> None:
    """Encode every block for the outputs of the encoded blocks before it.

    Refinement and compensation take steps on one batch after another: with them every rank runs all batches, and the
    first takes the steps.
    """
    settings = encoder.plan.config.calibration
    compensates = settings is not None and settings.compensate > 0
    of_batches = SOLO if refines or compensates else ranks
    batch = max(1, COMPENSATE_TOKENS // windows.shape[1]) if compensates else 0
    own: dict[str, Any] = {"ranks": of_batches, "folder": encoder.activations}
    stream = BlockStream(encoder.source, windows, encoder.device, batch, weights=encoder.outside, **own)
    targets: Activations = (
        BlockStream(encoder.source, windows, encoder.device, batch).hidden if refines else []
    )
    for number, (path, block) in enumerate(stream):
        inside = _inside(encoder.plan, path)
        if refines:
            targets = stream.run(block, targets)
        if compensates:
            _encode_in_groups(encoder, stream, block, inside, token_weights, progress, ranks)
        else:
            see = partial(stream.inputs, block, inside, token_weights)
            _encode_block(encoder, path, inside, see, progress, ranks)
        if refines:
            progress(encoder.share, f"{path}: refinement")
            if ranks.is_first:
                encoder.refine(number, f"{path}.", block, inside, stream, targets)
            ranks.sync_files(encoder.work.folder, [refined_unit(number)])
        encoder.install(number, inside, stream)
        stream.hidden = stream.run(block, stream.hidden)


def _encode_in_groups(
    encoder: MatrixEncoder,
    stream: BlockStream,
    block: nn.Module,
    inside: list[Matrix],
    token_weights: Mapping[str, Tensor] | None,
    progress: Progress,
    ranks: Ranks,
) -> None:
    """Encode the loaded block in groups; after each, the matrices that follow are tuned to make up for its errors."""
    settings, number = encoder.plan.config.calibration, stream.number
    path = f"{stream.path}.{number}"
    assert settings is not None
    if not _left(encoder, inside, ranks):
        encoder.passed += sum(map(_weights, inside))
        return
    targets, groups = stream.run(block, stream.hidden), groups_in_order(stream, block, inside)
    units = [compensated_unit(number, position) for position in range(len(groups) - 1)]
    for position, group in enumerate(groups):
        see = partial(stream.inputs, block, group, token_weights)
        _encode_block(encoder, path, group, see, progress, ranks)
        encoder.install(number, group, stream)
        for unit in units[position : position + 1]:
            if ranks.is_first and not encoder.work.has(unit):
                progress(encoder.share, f"{path}: compensation")
                later = [matrix for group in groups[position + 1 :] for matrix in group]
                seed = encoder.plan.config.seed + number
                encoder.work.save(unit, compensated(stream, block, later, targets, settings, seed), {})
            ranks.sync_files(encoder.work.folder, [unit])
            encoder.targets, _ = encoder.work.load(unit)
            for name, value in encoder.targets.items():
                stream.set_weight(name, value)
    encoder.targets = {}
    for unit in units:
        (encoder.work.folder / unit).unlink(missing_ok=True)


def _on_dense_inputs(
    encoder: MatrixEncoder,
    windows: Tensor,
    progress: Progress,
    refines: bool,
    kept: Path | None,
    token_weights: Mapping[str, Tensor] | None,
    own: Collection[str],
) -> None:
    """Encode the blocks whose paths are in `own` for their inputs in the dense model, without waiting for other ranks.

    These inputs depend only on model and text. They are kept in the folder `kept`, and a run at another target
    reads them there and need not run the model at all, unless it refines.
    """
    files = {path: kept / f"{path}.safetensors" for path in own} if kept is not None else {}

    def see(path: str, measured: Callable[[], Inputs]) -> Inputs:
        if path in files and is_intact(files[path]):
            return Inputs.load(files[path], encoder.device)
        found = measured()
        if path in files:
            found.save(files[path])
        return found

    list_path, blocks = block_list(encoder.source.model)
    if files and not refines and all(map(is_intact, files.values())):
        for path in (f"{list_path}.{number}" for number in range(len(blocks))):
            if path in own:
                load = partial(Inputs.load, files[path], encoder.device)
                _encode_block(encoder, path, _inside(encoder.plan, path), load, progress, SOLO)
        return
    stream = BlockStream(encoder.source, windows, encoder.device, folder=encoder.activations)
    left = len(own)
    for number, (path, block) in enumerate(stream if own else ()):
        inside, is_own = _inside(encoder.plan, path), path in own
        left -= is_own
        if is_own:
            seen = partial(see, path, partial(stream.inputs, block, inside, token_weights))
            _encode_block(encoder, path, inside, seen, progress, SOLO)
        if not left and not refines:
            break
        outputs = stream.run(block, stream.hidden)
        if is_own and refines:
            progress(encoder.share, f"{path}: refinement")
            encoder.refine(number, f"{path}.", block, inside, stream, outputs)
        stream.hidden = outputs


def _is_inside(matrix: Matrix) -> bool:
    return matrix.in_blocks and not matrix.in_tower


def _weights(matrix: Matrix) -> int:
    return matrix.weights


def _duration(matrix: Matrix) -> tuple[int, int]:
    """Orders matrices by how long they take: columns are encoded in turn, and rows together."""
    return matrix.weights, matrix.columns


def _inside(plan: Plan, path: str) -> list[Matrix]:
    return [m for m in plan.matrices if m.name.startswith(f"{path}.")]


def _left(encoder: MatrixEncoder, matrices: Sequence[Matrix], ranks: Ranks) -> list[Matrix]:
    """The matrices that are not yet encoded; all ranks take the same for that."""
    done = ranks.from_first(lambda: [encoder.done(m) for m in matrices])
    return [m for m, is_done in zip(matrices, done, strict=True) if not is_done]


def _share(encoder: MatrixEncoder, matrices: Sequence[Matrix], ranks: Ranks) -> None:
    """Wait until the ranks have encoded some matrices, and take over those of the others."""
    ranks.sync_files(encoder.work.folder, [matrix_unit(encoder.plan, m) for m in matrices])


def _encode_block(
    encoder: MatrixEncoder,
    path: str,
    inside: list[Matrix],
    see: Callable[[], Inputs],
    progress: Progress,
    ranks: Ranks,
) -> None:
    """Encode the matrices of a block, each on one of the ranks.

    Args:
        see: returns their inputs; not called if all are already encoded.
    """
    passed = encoder.passed + sum(map(_weights, inside))
    if left := _left(encoder, inside, ranks):
        progress(encoder.share, f"{path}: inputs")
        inputs = see()
        own = ranks.mine(left, _weights)
        order = sorted(own, key=_duration, reverse=True)  # the last to end is small, so no thread waits long
        step = encoder.at_once or max(1, len(order))
        for begin in range(0, len(order), step):
            _encode_together(encoder, path, order[begin : begin + step], inputs, len(inside), progress)
        _share(encoder, inside, ranks)
        return_freed()
    encoder.passed = passed


def _encode_together(
    encoder: MatrixEncoder, path: str, matrices: list[Matrix], inputs: Inputs, of: int, progress: Progress
) -> None:
    """Encode some of the `of` matrices of a block, with their Hessians in memory."""
    after = hessians_of_outputs(encoder.outputs, path, encoder.device, matrices, encoder.plan)
    hessians = hessians_of_inputs(matrices, inputs, encoder.plan)

    def encode(matrix: Matrix) -> None:
        encoder.encode(matrix, hessians[matrix.name], after.pop(matrix.name, None), inputs=inputs)

    jobs, most = [partial(encode, m) for m in matrices], most_parallel(matrices, torch.device(encoder.device))
    running = run_parallel(jobs, encoder.device, of=of, most=most)
    for matrix, _ in zip(matrices, running, strict=True):
        progress(encoder.share, matrix.name)
        encoder.passed += matrix.weights


def _encode_ends(
    encoder: MatrixEncoder, matrices: list[Matrix], sensitivity: Sensitivity, progress: Progress
) -> None:
    for matrix in matrices:
        progress(encoder.share, matrix.name)
        if matrix.in_tower:
            encoder.encode(matrix)
        else:
            _encode_end(encoder, matrix, sensitivity)
        encoder.passed += matrix.weights


def _encode_end(encoder: MatrixEncoder, matrix: Matrix, sensitivity: Sensitivity) -> None:
    """Encode embedding or head: errors in the head are weighted by its Hessian, errors in looked-up rows uniformly."""
    head, share = sensitivity.head_hessian.to(encoder.device), sensitivity.head_share[matrix.name]
    hessian = end_hessian(head, share)
    settings, rows = encoder.plan.config.calibration, sensitivity.row_importance[matrix.name]
    assert settings is not None
    encoder.encode(matrix, Hessian(hessian, settings.damping), row_importance=rows.to(encoder.device))
