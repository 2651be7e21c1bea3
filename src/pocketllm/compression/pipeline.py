"""plan -> fit -> encode -> pack -> write, one group of matrices at a time, resumable.

Unfinished work is in `OUTPUT.partial`: a file per fitted codebook and a file per encoded matrix, each written to a
temporary name and renamed. An interrupted run loses at most the unit it was working on; every unit has its own
seed, so the bytes are those of an uninterrupted run. At the end the checkpoint is assembled in
`OUTPUT.partial/final` and renamed to OUTPUT.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from pocketllm.calibrate.blocks import check_blocks
from pocketllm.calibrate.calibration import Calibration, calibrate, read_windows, text_identity
from pocketllm.codec.matrix_codec import MatrixCodec
from pocketllm.codec.rotation import rotate_matrix
from pocketllm.codec.subvectors import fold
from pocketllm.codec.training import fit
from pocketllm.compression.encode_blocks import encode_calibrated
from pocketllm.compression.matrix_encoder import MatrixEncoder, codebook_unit
from pocketllm.compression.write import write
from pocketllm.config import CompressConfig
from pocketllm.config.constants import SAMPLED_MATRICES
from pocketllm.errors import FormatError
from pocketllm.format import checkpoint as ckpt
from pocketllm.format.output import (
    check_not_nested,
    check_output,
    is_published,
    named_output,
    output_error,
)
from pocketllm.format.report import Report
from pocketllm.format.workspace import Workspace, locked
from pocketllm.plan.matrices import Matrix, Plan
from pocketllm.plan.target import planned
from pocketllm.source.dense_checkpoint import DenseCheckpoint, open_dense, resolve
from pocketllm.torch_state import in_default_torch_state


@dataclass(frozen=True)
class Event:
    """Progress: stage, its finished share, and the current item.

    Stages of a compression: `fetch`, `check`, `measure`, `fit`, `encode`, `write`; of recovery: `teacher`,
    `train`; of a merge: `perplexity`, `merge`.
    """

    stage: str
    share: float
    detail: str


ProgressCallback = Callable[[Event], None]


@in_default_torch_state
def compress(
    model: str | Path,
    config: CompressConfig,
    output: str | Path,
    *,
    progress: ProgressCallback = lambda event: None,
    device: str = "cpu",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    calibration_folder: str | Path | None = None,
) -> Report:
    """Compress a causal language model.

    Args:
        model: local folder, Hub id, or `builtin:smollm2-135m`.
        config: the settings; see `pocketllm.preset`.
        output: folder to create. An unfinished run with the same arguments is resumed.
        progress: called often, from this thread.
        device: where codecs are fitted and matrices encoded, `cpu` or `cuda`.
        overwrite: replace an earlier compressed model at `output`.
        trust_remote_code: let transformers run code that the model folder contains.
        calibration_folder: folder for the measurements of calibration, reused by later runs; see `calibrate`.

    Returns:
        Sizes, ratios and errors, as `info` shows them later.

    Raises:
        SourceError, WeightError, ConfigError, OutputError, ResumeError: `output` is not created; finished work
            stays in `output.partial` for the next run.

    Example:
        >>> report = pocketllm.compress("builtin:smollm2-135m", pocketllm.preset("lookup-8x"), "out")
    """
    started = time.monotonic()
    output = named_output(output)
    check_output(output, overwrite)
    folder = resolve(str(model), lambda message: progress(Event("fetch", 0.0, message)))
    source = open_dense(folder, trust_remote_code)
    checkpoint = planned(source, config, str(model))
    check_not_nested(output, folder)
    # Errors in the input are found before anything is written and before the long work.
    windows = read_windows(source, config)
    if windows is not None:
        check_blocks(source, windows, device)
    if not Workspace.is_begun(output):
        source.check(partial(_tell, progress, "check"))
    try:
        work = Workspace.open(output, source, config, str(model), device, text_identity(windows))
        with locked(work.folder):
            if is_published(output):  # by an earlier run that was killed afterwards
                work.drop()
                return Report.from_dict(ckpt.read_report(output)).of_run(started, device)
            found = _calibrated(source, windows, config, device, calibration_folder, work.folder, progress)
            if found is not None:
                checkpoint = planned(source, config, str(model), **found.sensitivity.for_plan)
            _fit_and_encode(work, source, checkpoint.plan, found, device, progress)
            progress(Event("write", 0.0, "writing the checkpoint"))
            report = write(checkpoint, work)
            work.publish(output)
    except OSError as error:
        raise output_error(output, error) from error
    progress(Event("write", 1.0, str(output)))
    return report.of_run(started, device)


def is_made(output: Path, model: str, config: CompressConfig) -> bool:
    """Whether an earlier run has compressed a model of this name with these settings."""
    try:
        report = ckpt.read_report(output)
    except FormatError:
        return False
    return bool(report["model"] == model and report["config"] == config.to_dict())


@in_default_torch_state
def dry_run(
    model: str | Path,
    config: CompressConfig,
    trust_remote_code: bool = False,
    *,
    progress: ProgressCallback = lambda event: None,
    device: str = "cpu",
    calibration_folder: str | Path | None = None,
) -> Report:
    """The plan and the exact sizes in bytes without fitting anything; errors are predictions.

    With calibration the model's sensitivity is measured, because the plan depends on it.
    """
    source = open_dense(resolve(str(model)), trust_remote_code)
    source.check_dtypes()
    checkpoint = planned(source, config, str(model))
    windows = read_windows(source, config)
    if windows is not None:
        check_blocks(source, windows, device)
    found = _calibrated(source, windows, config, device, calibration_folder, None, progress)
    if found is not None:
        checkpoint = planned(source, config, str(model), **found.sensitivity.for_plan)
    return checkpoint.dry_report()


def _calibrated(
    source: DenseCheckpoint,
    windows: Tensor | None,
    config: CompressConfig,
    device: str,
    folder: str | Path | None,
    scratch: Path | None,
    progress: ProgressCallback,
) -> Calibration | None:
    if windows is None:
        return None
    on_progress = partial(_tell, progress, "measure", detail="sensitivity of every matrix")
    return calibrate(source, windows, config, device, Path(folder) if folder else None, scratch, on_progress)


def _fit_and_encode(
    work: Workspace,
    source: DenseCheckpoint,
    plan: Plan,
    calibration: Calibration | None,
    device: str,
    progress: ProgressCallback,
) -> None:
    """Fit every codebook group and encode its matrices; with calibration, encode after all are fitted."""
    codecs: dict[str, MatrixCodec] = {}
    outputs = None if calibration is None else calibration.outputs
    encoder = MatrixEncoder(
        work, source, plan, lambda matrix: codecs[plan.decoder_key(matrix)], device, outputs
    )
    done = 0
    for number, (key, group) in enumerate(plan.groups().items()):
        which = f"codebook {number + 1} of {len(plan.groups())} ({key.split('|')[0]})"
        on_progress = partial(_tell, progress, "fit", detail=which)
        fitted = _fitted(work, source, plan, number, device, on_progress)
        if calibration is not None:
            codecs.update(fitted)
            continue
        codecs = fitted
        for matrix in group:
            progress(Event("encode", done / plan.weights, matrix.name))
            encoder.encode(matrix)
            done += matrix.weights
    if calibration is not None:
        on_progress = partial(_tell, progress, "encode")
        encode_calibrated(
            encoder,
            calibration.windows,
            calibration.sensitivity,
            on_progress,
            kept=calibration.kept,
            token_weights=calibration.token_weights,
        )
    progress(Event("encode", 1.0, f"{plan.weights:,} weights"))


def _tell(progress: ProgressCallback, stage: str, share: float, detail: str) -> None:
    progress(Event(stage, share, detail))


def _fitted(
    work: Workspace,
    source: DenseCheckpoint,
    plan: Plan,
    number: int,
    device: str,
    progress: Callable[[float], None],
) -> dict[str, MatrixCodec]:
    """The codecs of a codebook group by decoder key, fitted or read from an earlier run, rounded as stored."""
    key, group = list(plan.groups().items())[number]
    spec = plan.specs[group[0].name]
    config = plan.config.codec_for(spec.vector_len)
    keys = list(dict.fromkeys(plan.decoder_key(m) for m in group))
    name = codebook_unit(number)
    if not work.has(name):
        seed = zlib.crc32(f"{plan.config.seed}|{key}".encode())
        samples = _samples(source, plan, group, seed, device)
        # The seed of a codebook that is not stored is part of the stored form.
        drawn = plan.config.seed if config.codebook_source == "seed" else seed
        result = fit(samples, config, spec.form, drawn, keys=keys, progress=progress)
        work.save(name, _unit_tensors([result.codecs[k] for k in keys]), {"codebook": key, **result.facts()})
    tensors, _ = work.load(name)
    codebook = nn.Parameter(tensors["codebook"].float(), requires_grad=False)
    codecs = {}
    for position, decoder_key in enumerate(keys):
        codec = MatrixCodec(config, codebook)
        for net in ("encoder", "decoder"):
            codec.get_submodule(net).set_weights(  # type: ignore[operator]
                tensors[f"{net}.{position}.up"], tensors[f"{net}.{position}.down"]
            )
        codecs[decoder_key] = codec.to(device)
    return codecs


def _unit_tensors(codecs: list[MatrixCodec]) -> dict[str, Tensor]:
    """The tensors of fitted codecs: the stored part in float16, encoders (needed to encode) in float32."""
    tensors = {"codebook": codecs[0].codebook.detach().half()}
    for position, codec in enumerate(codecs):
        for net, dtype in ((codec.encoder, torch.float32), (codec.decoder, torch.float16)):
            kind = "encoder" if net is codec.encoder else "decoder"
            up, down = net.weights()
            tensors[f"{kind}.{position}.up"] = up.to(dtype)
            tensors[f"{kind}.{position}.down"] = down.to(dtype)
    return tensors


def _samples(
    source: DenseCheckpoint, plan: Plan, group: list[Matrix], seed: int, device: str
) -> dict[str, list[Tensor]]:
    """Random rows of the group's matrices, within the limits on the sample."""
    spec = plan.specs[group[0].name]
    settings = plan.config.codec
    # On a hashed trellis every window counts as a codeword: there are as many paths to learn from.
    budget = min(
        settings.max_sample, settings.sample_per_codeword * max(spec.codebook_size, 1 << spec.window)
    )
    same_distribution = plan.config.calibration is not None and plan.config.calibration.rotate
    if same_distribution and (not spec.form.trains_networks or plan.config.decoder_scope != "matrix"):
        group = _some(group)  # a few matrices represent all
    available = sum(m.subvectors(spec.vector_len) for m in group)
    share = min(1.0, budget / available)
    blocks: dict[tuple[str, int], list[Tensor]] = {}
    for matrix in group:
        generator = torch.Generator().manual_seed(zlib.crc32(matrix.name.encode(), seed))
        weight = rotate_matrix(fold(source.read(matrix.name), matrix.transposed), plan.rotation(matrix))
        count = max(1, round(share * matrix.rows))
        rows = torch.randperm(matrix.rows, generator=generator)[:count].sort().values
        sample = weight[rows].float().to(device)
        blocks.setdefault((plan.decoder_key(matrix), matrix.columns), []).append(sample)
    samples: dict[str, list[Tensor]] = {}
    for (decoder_key, _), parts in blocks.items():
        samples.setdefault(decoder_key, []).append(torch.cat(parts))
    return samples


def _some(group: list[Matrix]) -> list[Matrix]:
    """At most `SAMPLED_MATRICES` matrices of each kind, spread over the model."""
    kinds: dict[str, list[Matrix]] = {}
    for matrix in group:
        kinds.setdefault(matrix.kind, []).append(matrix)
    return [m for kind in kinds.values() for m in kind[:: -(-len(kind) // SAMPLED_MATRICES)]]
