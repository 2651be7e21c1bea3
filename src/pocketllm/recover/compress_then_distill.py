"""Compress a model and distill the result, as one resumable run."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from pocketllm.compression.pipeline import compress, is_made
from pocketllm.compression.progress import ProgressCallback
from pocketllm.config import CompressConfig, DistillConfig
from pocketllm.errors import OutputError
from pocketllm.format import checkpoint as ckpt
from pocketllm.format.output import named_output
from pocketllm.format.report import Report
from pocketllm.format.workspace import remove_published
from pocketllm.recover.distill import DistillResult, distill
from pocketllm.recover.distill_task import training_windows
from pocketllm.recover.run_log import check_places, read_result
from pocketllm.source.dense_checkpoint import resolve
from pocketllm.source.folder import need_tokenizer, read_config
from pocketllm.text.vocabulary import check_positions


def compress_and_distill(
    model: str | Path,
    config: CompressConfig,
    recovery: DistillConfig,
    output: str | Path,
    *,
    made: Callable[[str, Path], None] = lambda stage, folder: None,
    progress: ProgressCallback = lambda event: None,
    device: str = "cpu",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    calibration_folder: str | Path | None = None,
) -> tuple[Report, DistillResult]:
    """`compress`, then `distill` on its result; an interrupted run resumes when it is called again.

    Args:
        output: folder of the recovered model; until it is finished, `OUTPUT.plain` is the model before recovery.
        made: called with `compressed` or `recovered` and the folder, when that model is finished.

    Returns:
        The report of the recovered model, and the result of the distillation.

    Raises:
        As `compress` and `distill`; the inputs of the recovery are checked before anything is compressed.
        OutputError: `OUTPUT.plain` exists and was not made by this call.
    """
    output, started = named_output(output), time.monotonic()
    plain = output.with_name(output.name + ".plain")
    if plain.exists() and _is_done(output, str(model), config, recovery):  # killed while `plain` was removed
        shutil.rmtree(plain)
        remove_published(output)
        return Report.from_dict(ckpt.read_report(output)), read_result(output, DistillResult)
    check_places(output, overwrite)
    _check_plain(plain, str(model), config)
    check_recovery(model, recovery, trust_remote_code)
    if plain.exists():
        remove_published(plain)
    else:
        compress(
            model,
            config,
            plain,
            progress=progress,
            device=device,
            trust_remote_code=trust_remote_code,
            calibration_folder=calibration_folder,
        )
    made("compressed", plain)
    done = distill(
        plain,
        output,
        recovery,
        teacher=str(model),
        progress=progress,
        device=device,
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
    )
    made("recovered", output)
    shutil.rmtree(plain)
    return Report.from_dict(ckpt.read_report(output)).of_run(started, device), done


def _check_plain(plain: Path, model: str, config: CompressConfig) -> None:
    """Check that the folder of the model before recovery is free, or was made by an earlier run of this call."""
    if plain.exists() and not is_made(plain, model, config):
        raise OutputError(
            f"{plain}: exists and was not created by an earlier run of this command; move it away, or choose "
            "another output folder"
        )


def _is_done(output: Path, model: str, config: CompressConfig, recovery: DistillConfig) -> bool:
    """Whether an earlier run has compressed and recovered this model with these settings."""
    if not is_made(output, model, config):
        return False
    facts = ckpt.read_report(output).get("recover")
    return isinstance(facts, dict) and facts.get("config") == json.loads(json.dumps(recovery.to_dict()))


def check_recovery(model: str | Path, recovery: DistillConfig, trust_remote_code: bool = False) -> None:
    """Check the inputs of a recovery before its dense model is compressed.

    Raises:
        SourceError: a text cannot be read.
        ConfigError: a text is too short, or a window is longer than the model's positions.
    """
    dense = resolve(str(model))
    check_positions(read_config(dense, trust_remote_code), recovery.context, str(model))
    training_windows(need_tokenizer(dense, trust_remote_code), recovery)
