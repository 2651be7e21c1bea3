"""Compress and recover in one go."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from pocketllm.compression.pipeline import ProgressCallback, compress, is_made
from pocketllm.config import CompressConfig, DistillConfig
from pocketllm.errors import OutputError
from pocketllm.format import checkpoint as ckpt
from pocketllm.format.output import named_output
from pocketllm.format.report import Report
from pocketllm.recover.distill import Distilled, distill
from pocketllm.recover.distillation import training_windows
from pocketllm.recover.log import check_places, finished
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
) -> tuple[Report, Distilled]:
    """`compress`, then `distill` on its result. Killed and started again, it goes on where it was.

    Args:
        output: the recovered model; the one before recovery lies in `OUTPUT.plain` meanwhile.
        made: called with each model that is finished, `compressed` and `recovered`, and its folder.

    Returns:
        The report of the recovered model, and what the distillation did.

    Raises:
        As `compress` and `distill`; what concerns the recovery before anything is compressed.
    """
    output, started = named_output(output), time.monotonic()
    plain = output.with_name(output.name + ".plain")
    if plain.exists() and _is_done(output, str(model), config, recovery):  # killed while `plain` was removed
        shutil.rmtree(plain)
        return Report.from_dict(ckpt.read_report(output)), finished(output, Distilled)
    check_places(output, overwrite)
    if plain.exists() and not is_made(plain, str(model), config):
        raise OutputError(
            f"{plain}: exists and is not what this command makes on its way; move it away, or choose another "
            "output folder"
        )
    check_recovery(model, recovery, trust_remote_code)
    if not plain.exists():
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


def _is_done(output: Path, model: str, config: CompressConfig, recovery: DistillConfig) -> bool:
    """Whether an earlier run has compressed and recovered this model with these settings."""
    if not is_made(output, model, config):
        return False
    facts = ckpt.read_report(output).get("recover")
    return isinstance(facts, dict) and facts.get("config") == json.loads(json.dumps(recovery.to_dict()))


def check_recovery(model: str | Path, recovery: DistillConfig, trust_remote_code: bool = False) -> None:
    """Whether a recovery of what this dense model is compressed to can begin.

    Raises:
        SourceError, ConfigError: a text cannot be read, or is too short; a window is longer than the model takes.
    """
    dense = resolve(str(model))
    check_positions(read_config(dense, trust_remote_code), recovery.context, str(model))
    training_windows(need_tokenizer(dense, trust_remote_code), recovery)
