"""Encode a model with calibration: embedding and head first, then one block after another for its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pocketllm.calibrate.blocks import BlockStream, block_list
from pocketllm.calibrate.embedding_cost import end_hessian
from pocketllm.calibrate.input_hessians import Inputs
from pocketllm.calibrate.sensitivity import Sensitivity, output_hessians
from pocketllm.codec.hessian import Hessian
from pocketllm.compression.matrix_encoder import MatrixEncoder
from pocketllm.config.constants import OUTPUT_DAMPING
from pocketllm.format.kept import is_intact
from pocketllm.plan.matrices import Matrix, Plan

Progress = Callable[[float, str], None]
_MOST_PARALLEL = 4  # jobs at once; each takes memory of its own


def encode_calibrated(
    encoder: MatrixEncoder,
    windows: Tensor,
    sensitivity: Sensitivity,
    progress: Progress,
    kept: Path | None = None,
    token_weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Encode towers (without calibration), embedding and head, then one block after another for its inputs.

    Args:
        windows: [N, context] token ids of the calibration text.
        token_weights: [N, context] by matrix, see `BlockStream.inputs`.
        kept: folder with the Hessians of the dense model's inputs from an earlier run; see `_on_dense_inputs`.
    """
    settings = encoder.plan.config.calibration
    assert settings is not None
    for matrix in encoder.plan.matrices:
        if matrix.in_tower:
            progress(encoder.share, matrix.name)
            encoder.encode(matrix)
            encoder.passed += matrix.weights
        elif not matrix.in_blocks:
            progress(encoder.share, matrix.name)
            _encode_end(encoder, matrix, sensitivity)
    if settings.sequential:
        _on_compressed_inputs(encoder, windows, progress, settings.refine_epochs > 0, token_weights)
    else:
        _on_dense_inputs(encoder, windows, progress, settings.refine_epochs > 0, kept, token_weights)


def _on_compressed_inputs(
    encoder: MatrixEncoder,
    windows: Tensor,
    progress: Progress,
    refines: bool,
    token_weights: Mapping[str, Tensor] | None,
) -> None:
    """Encode every block for the outputs of the encoded blocks before it."""
    ends = {m.name: encoder.decoded(m) for m in encoder.plan.matrices if not m.in_blocks}
    stream = BlockStream(encoder.source, windows, encoder.device, weights=ends)
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


def _on_dense_inputs(
    encoder: MatrixEncoder,
    windows: Tensor,
    progress: Progress,
    refines: bool,
    kept: Path | None,
    token_weights: Mapping[str, Tensor] | None,
) -> None:
    """Encode every block for its inputs in the dense model.

    These inputs depend only on model and text. They are kept in the folder `kept`, and a run at another target
    reads them there and need not run the model at all, unless it refines.
    """
    list_path, blocks = block_list(encoder.source.model)
    files = {}
    if kept is not None:
        files = {f"{list_path}.{n}": kept / f"{list_path}.{n}.safetensors" for n in range(len(blocks))}

    def see(path: str, measured: Callable[[], Inputs]) -> Inputs:
        if path in files and is_intact(files[path]):
            return Inputs.load(files[path], encoder.device)
        found = measured()
        if path in files:
            found.save(files[path])
        return found

    if files and not refines and all(map(is_intact, files.values())):
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
    encoder: MatrixEncoder, path: str, inside: list[Matrix], see: Callable[[], Inputs], progress: Progress
) -> None:
    """Encode the matrices of a block; `see` returns their inputs and is not called if all are already encoded."""
    if all(encoder.done(m) for m in inside):
        encoder.passed += sum(m.weights for m in inside)
        return
    progress(encoder.share, f"{path}: inputs")
    inputs = see()
    after = output_hessians(encoder.outputs, path, encoder.device)

    hessians = _input_hessians(inside, inputs, encoder.plan)

    def encode(matrix: Matrix) -> None:
        found = after.get(matrix.name)
        outputs = None if found is None else Hessian(found, OUTPUT_DAMPING)
        encoder.encode(matrix, hessians[matrix.name], outputs, inputs=inputs)

    jobs = [partial(encode, matrix) for matrix in inside]
    for number, _ in enumerate(run_parallel(jobs, encoder.device)):
        progress(encoder.share, inside[number].name)
        encoder.passed += inside[number].weights


def _encode_end(encoder: MatrixEncoder, matrix: Matrix, sensitivity: Sensitivity) -> None:
    """Encode embedding or head: errors in the head are weighted by its Hessian, errors in looked-up rows uniformly."""
    head, share = sensitivity.head_hessian.to(encoder.device), sensitivity.head_share[matrix.name]
    hessian = end_hessian(head, share)
    settings, rows = encoder.plan.config.calibration, sensitivity.row_importance[matrix.name]
    assert settings is not None
    encoder.encode(matrix, Hessian(hessian, settings.damping), row_importance=rows.to(encoder.device))


def _input_hessians(matrices: list[Matrix], inputs: Inputs, plan: Plan) -> dict[str, Hessian]:
    """The Hessian of each matrix's inputs, one for all that share them.

    They are factorized here, before matrices are encoded in parallel: with all threads, and in a fixed order.
    """
    settings, shared = plan.config.calibration, dict[int, Hessian]()
    assert settings is not None
    for matrix in matrices:
        hessian = inputs.hessians[matrix.name]
        made = shared.setdefault(id(hessian), Hessian(hessian, settings.damping))
        made.factor(plan.rotation(matrix)[1], plan.specs[matrix.name].vector_len)
    return {m.name: shared[id(inputs.hessians[m.name])] for m in matrices}


def run_parallel(jobs: Sequence[Callable[[], None]], device: torch.device | str) -> Iterator[None]:
    """Run jobs that do not depend on each other; yields before each, and ends when all are done.

    On a CPU some run at once and share the threads: jobs of many small operations gain little from threads of
    their own. Results depend only on the number of threads.
    """
    threads, jobs = torch.get_num_threads(), [torch.no_grad()(job) for job in jobs]
    workers = min(threads, len(jobs), _MOST_PARALLEL)
    if torch.device(device).type != "cpu" or workers < 2:
        for job in jobs:
            yield
            job()
        return
    with ThreadPoolExecutor(
        workers, initializer=torch.set_num_threads, initargs=(threads // workers,)
    ) as pool:
        try:
            for running in [pool.submit(job) for job in jobs]:
                yield
                running.result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # which threads started later would take over
