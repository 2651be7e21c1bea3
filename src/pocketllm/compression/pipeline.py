"""plan -> fit -> encode -> pack -> write, one group of matrices at a time, resumable.

Unfinished work is in `OUTPUT.partial`: a file per fitted codebook and a file per encoded matrix, each written to a
temporary name and renamed. An interrupted run loses at most the unit it was working on; every unit has its own seed,
so the bytes are those of an uninterrupted run. At the end `OUTPUT.partial/final` is assembled and renamed to OUTPUT.

Processes launched together by torchrun share the work: each makes some of the units, all take part in the
measurements, and the first assembles the checkpoint.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

from pocketllm.calibrate.calibration import (
    read_windows,
)
from pocketllm.compression.compress_job import CompressJob
from pocketllm.compression.progress import Event, ProgressCallback, ignore, tell
from pocketllm.config import CompressConfig
from pocketllm.errors import FormatError
from pocketllm.format import checkpoint as ckpt
from pocketllm.format.mapped_pages import drop_files
from pocketllm.format.output import (
    check_not_nested,
    check_output,
    named_output,
    output_error,
)
from pocketllm.format.report import Report
from pocketllm.format.workspace import Workspace
from pocketllm.ranks import joined
from pocketllm.source.dense_checkpoint import DenseCheckpoint, open_dense, resolve
from pocketllm.source.folder import check_companions
from pocketllm.torch_state import in_default_torch_state

logger = logging.getLogger(__name__)

_MEASURED_BY_PLANS = 1 << 32  # weights of a model for which a plan measures what it cannot keep


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

    Processes launched by torchrun do it together; see docs/scaling.md. Each returns the report.

    Args:
        model: local folder, GGUF file, Hub id, `builtin:smollm2-135m` or `builtin:gemma-3-270m`.
        config: the settings; see `pocketllm.preset`.
        output: folder to create. An unfinished run with the same arguments is resumed.
        progress: called often, from this thread; of processes launched together, in the first.
        device: where codecs are fitted and matrices encoded, `cpu` or `cuda`.
        overwrite: replace an earlier compressed model at `output`.
        trust_remote_code: let transformers run code that the model folder contains.
        calibration_folder: folder for the measurements of calibration, reused by later runs; see `calibrate`.

    Returns:
        Sizes, ratios and errors, as `info` shows them later.

    Raises:
        SourceError, WeightError, ConfigError, OutputError, ResumeError: `output` is not created; finished work
            stays in `output.partial` for the next run. RankError: as these, in another process.

    Example:
        >>> report = pocketllm.compress("builtin:smollm2-135m", pocketllm.preset("lookup-8x"), "out")
    """
    started, output = time.monotonic(), named_output(output)
    with joined(device) as ranks:
        if ranks.is_first:
            check_output(output, overwrite)
        else:
            progress = ignore
        fetched = partial(tell, progress, "fetch", 0.0)
        folder = ranks.first_goes_first(partial(resolve, str(model), fetched))
        source = open_dense(folder, trust_remote_code)
        job = CompressJob(source, config, str(model), device, calibration_folder, progress, ranks)
        # Errors in the input are found before anything is written and before the long work.
        check_not_nested(output, folder)
        first = job.first_plan()
        check_companions(source.folder, trust_remote_code)
        text = job.text()
        job = job.within_memory(first, text)
        if not ranks.from_first(lambda: Workspace.is_begun(output)) and ranks.is_first:
            source.check(partial(_on_check, source, progress))
        try:
            report = job.run(output, overwrite, first, text)
        except OSError as error:
            raise output_error(output, error) from error
    progress(Event("write", 1.0, str(output)))
    return report.of_run(started, device)


def _on_check(source: DenseCheckpoint, progress: ProgressCallback, share: float, detail: str) -> None:
    """Drop from memory what has been checked."""
    drop_files(source.files)
    tell(progress, "check", share, detail)


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

    With calibration the model's sensitivity is measured, because the plan depends on it; for more than 4 billion
    weights only with a `calibration_folder`, where `compress` finds it again. Otherwise a warning says what is assumed.
    """
    source = open_dense(resolve(str(model)), trust_remote_code)
    source.check_dtypes()
    check_companions(source.folder, trust_remote_code)
    with joined(device) as ranks:
        on_progress = progress if ranks.is_first else ignore
        job = CompressJob(source, config, str(model), device, calibration_folder, on_progress, ranks)
        first = job.first_plan()
        if calibration_folder is None and first.plan.weights > _MEASURED_BY_PLANS:
            if read_windows(source, config) is not None:
                logger.warning(
                    "plan of %.1f billion weights: sensitivities were not measured; errors in all weights are "
                    "assumed to cost the same, so bits by matrix will differ. Give --calibration-cache to measure",
                    first.plan.weights / 1e9,
                )
            return first.dry_report()
        text = job.text()
        job = job.within_memory(first, text)
        report = job.calibrated(first, text, None)[0].dry_report()
        return replace(report, peak_memory_bytes=job.memory.peak) if job.memory.stages else report
