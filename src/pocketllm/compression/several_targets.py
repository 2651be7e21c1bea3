"""Compress one model to several targets: what does not depend on the target is measured once."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pocketllm.compression.pipeline import compress, is_made
from pocketllm.compression.progress import ProgressCallback
from pocketllm.config import CompressConfig
from pocketllm.errors import ConfigError
from pocketllm.format import checkpoint as ckpt
from pocketllm.format.output import check_not_nested, check_output
from pocketllm.format.report import Report
from pocketllm.plan.target import planned
from pocketllm.ranks import joined, launched
from pocketllm.source.dense_checkpoint import open_dense, resolve

_MEASURED = "measured.partial"


def compress_targets(
    model: str | Path,
    configs: Sequence[CompressConfig],
    output: str | Path,
    *,
    made: Callable[[str, Path], None] = lambda name, folder: None,
    progress: ProgressCallback = lambda event: None,
    device: str = "cpu",
    overwrite: bool = False,
    trust_remote_code: bool = False,
    calibration_folder: str | Path | None = None,
) -> dict[str, Report]:
    """`compress` to several numbers of bits per weight; an interrupted run resumes when it is called again.

    The results have the bytes of separate runs. Shared are the sensitivities and the Hessians of outputs, and with
    `calibration.sequential` off those of inputs, too.

    Args:
        configs: settings that have a `target_bpw` each.
        output: folder of the results, which are called by their targets: OUTPUT/2, OUTPUT/2.5.
        made: called with the name and folder of every finished model.
        calibration_folder: see `compress`; by default a folder in `output`, which is removed at the end.

    Returns:
        The report of every result by its name.

    Raises:
        As `compress`; TargetError and OutputError, if no plan meets one of the targets or one of the folders cannot
            be created, before anything is made.
    """
    output, names = Path(output), target_names(configs)
    source = open_dense(resolve(str(model)), trust_remote_code)
    for config in configs:
        planned(source, config, str(model))
    if launched()[0] == 0:
        for name, config in zip(names, configs, strict=True):
            check_not_nested(output / name, source.folder)
            if overwrite or not is_made(output / name, str(model), config):
                check_output(output / name, overwrite)
    measured, reports = output / _MEASURED, dict[str, Report]()
    for name, config in zip(names, configs, strict=True):
        folder = output / name
        found = None if overwrite else _finished(folder, str(model), config, device)
        if found is None:
            found = compress(
                model,
                config,
                folder,
                progress=progress,
                device=device,
                overwrite=overwrite,
                trust_remote_code=trust_remote_code,
                calibration_folder=calibration_folder or measured,
            )
        reports[name] = found
        made(name, folder)
    shutil.rmtree(measured, ignore_errors=True)
    return reports


def _finished(folder: Path, model: str, config: CompressConfig, device: str) -> Report | None:
    """The report of a result that an earlier run has made, as the first of the processes launched together sees it."""

    def read() -> dict[str, Any] | None:
        return (
            Report.from_dict(ckpt.read_report(folder)).to_dict() if is_made(folder, model, config) else None
        )

    with joined(device) as ranks:
        found = ranks.from_first(read)
    return None if found is None else Report.from_dict(found)


def target_names(configs: Sequence[CompressConfig]) -> list[str]:
    """The folder of each result.

    Raises:
        ConfigError: a target is given twice, or is not in bits per weight.
    """
    if any(config.target_bpw is None or config.codebook_size is not None for config in configs):
        raise ConfigError("several targets: got one that is not in bits per weight, wanted target_bpw in all")
    names = [f"{config.target_bpw:g}" for config in configs]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError(f"several targets: got {twice[0]} bits per weight twice; give each target once")
    return names
