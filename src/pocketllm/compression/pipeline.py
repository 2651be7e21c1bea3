"""plan -> fit -> encode -> pack -> write, one group of matrices at a time, resumable.

Unfinished work is in `OUTPUT.partial`: a file per fitted codebook and a file per encoded matrix, each written to a
temporary name and renamed. An interrupted run loses at most the unit it was working on; every unit has its own seed,
so the bytes are those of an uninterrupted run. At the end `OUTPUT.partial/final` is assembled and renamed to OUTPUT.

Processes launched together by torchrun share the work: each makes some of the units, all take part in the
measurements, and the first assembles the checkpoint.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pocketllm.calibrate.blocks import check_blocks
from pocketllm.calibrate.calibration import (
    Calibration,
    CalibrationText,
    calibrate,
    read_windows,
    text_identity,
)
from pocketllm.codec.matrix_codec import MatrixCodec
from pocketllm.compression.encode_blocks import encode_calibrated
from pocketllm.compression.fit_codebooks import fitted_codecs
from pocketllm.compression.matrix_encoder import MatrixEncoder, codebook_unit
from pocketllm.compression.write import write
from pocketllm.config import CompressConfig
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
from pocketllm.plan.matrices import Plan
from pocketllm.plan.sizes import PlannedModel
from pocketllm.plan.target import planned
from pocketllm.ranks import Ranks, joined
from pocketllm.source.dense_checkpoint import DenseCheckpoint, open_dense, resolve
from pocketllm.source.folder import check_companions
from pocketllm.torch_state import in_default_torch_state

logger = logging.getLogger(__name__)

_MEASURED_BY_PLANS = 1 << 32  # weights of a model for which a plan measures what it cannot keep


@dataclass(frozen=True)
class Event:
    """Progress: stage, its finished share, and the current item.

    Stages of a compression: `fetch`, `check`, `measure`, `fit`, `encode`, `write`; of recovery: `teacher`, `train`; of
    a merge: `perplexity`, `merge`.
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
            progress = _ignore
        fetched = partial(_tell, progress, "fetch", 0.0)
        folder = ranks.first_goes_first(partial(resolve, str(model), fetched))
        source = open_dense(folder, trust_remote_code)
        job = _Job(source, config, str(model), device, calibration_folder, progress, ranks)
        # Errors in the input are found before anything is written and before the long work.
        check_not_nested(output, folder)
        first = job.first_plan()
        check_companions(source.folder, trust_remote_code)
        text = job.text()
        if not ranks.from_first(lambda: Workspace.is_begun(output)) and ranks.is_first:
            source.check(partial(_tell, progress, "check"))
        try:
            report = job.run(output, overwrite, first, text)
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

    With calibration the model's sensitivity is measured, because the plan depends on it; for more than 4 billion
    weights only with a `calibration_folder`, where `compress` finds it again. Otherwise a warning says what is assumed.
    """
    source = open_dense(resolve(str(model)), trust_remote_code)
    source.check_dtypes()
    check_companions(source.folder, trust_remote_code)
    with joined(device) as ranks:
        on_progress = progress if ranks.is_first else _ignore
        job = _Job(source, config, str(model), device, calibration_folder, on_progress, ranks)
        first = job.first_plan()
        if calibration_folder is None and first.plan.weights > _MEASURED_BY_PLANS:
            if read_windows(source, config) is not None:
                logger.warning(
                    "plan of %.1f billion weights: sensitivities were not measured; errors in all weights are "
                    "assumed to cost the same, so bits by matrix will differ. Give --calibration-cache to measure",
                    first.plan.weights / 1e9,
                )
            return first.dry_report()
        return job.calibrated(first, job.text(), None)[0].dry_report()


@dataclass(frozen=True)
class _Job:
    """What is compressed, with which settings. model: the name the user gave."""

    source: DenseCheckpoint
    config: CompressConfig
    model: str
    device: str
    calibration_folder: str | Path | None
    progress: ProgressCallback
    ranks: Ranks

    def run(self, output: Path, overwrite: bool, first: PlannedModel, text: CalibrationText | None) -> Report:
        """Do the work that no earlier run has done, and put the result at `output`."""
        ranks, identity = self.ranks, None if text is None else text_identity(text.windows)
        work = ranks.first_goes_first(
            partial(Workspace.open, output, self.source, self.config, self.model, self.device, identity)
        )
        with locked(work.folder, ranks.is_first):
            if ranks.from_first(lambda: is_published(output)):  # by an earlier run that was killed afterwards
                return self._shared(partial(self._published, output, work), work)
            self._sync(work)
            planned, found = self.calibrated(first, text, work.folder)
            self.fit_and_encode(work, planned.plan, found)
            self._sync(work)

            def make() -> Report:
                self.progress(Event("write", 0.0, "writing the checkpoint"))
                report = write(planned, work)
                work.publish(output, overwrite)
                return report

            return self._shared(make, work)

    def _shared(self, make: Callable[[], Report], work: Workspace) -> Report:
        """The report of the first rank, which drops the workspace; others drop that on a file system of their own."""
        if self.ranks.size == 1:
            return make()
        found = self.ranks.from_first(lambda: make().to_dict())
        shutil.rmtree(work.folder, ignore_errors=True)
        return Report.from_dict(found)

    @staticmethod
    def _published(output: Path, work: Workspace) -> Report:
        work.drop()
        return Report.from_dict(ckpt.read_report(output))

    def _sync(self, work: Workspace) -> None:
        """Send units to the ranks that do not see them."""
        if self.ranks.size > 1:
            names = self.ranks.gather([path.name for path in work.folder.glob("*.safetensors")])
            self.ranks.sync_files(work.folder, sorted({name for some in names for name in some}))

    def first_plan(self) -> PlannedModel:
        """The plan before calibration."""
        return planned(self.source, self.config, self.model)

    def text(self) -> CalibrationText | None:
        """The calibration text, on which the blocks have been tried; None without calibration."""
        text = read_windows(self.source, self.config)
        if text is not None:
            check_blocks(self.source, text.windows, self.device)
        return text

    def calibrated(
        self, first: PlannedModel, text: CalibrationText | None, scratch: Path | None
    ) -> tuple[PlannedModel, Calibration | None]:
        """The final plan, and the calibration that it is based on.

        Args:
            first: the plan before calibration. scratch: see `calibrate`.
        """
        if text is None:
            return first, None
        folder = Path(self.calibration_folder) if self.calibration_folder else None
        tell = partial(_tell, self.progress, "measure", detail="sensitivity of every matrix")
        found = calibrate(self.source, text, self.config, self.device, folder, scratch, tell, self.ranks)
        return planned(self.source, self.config, self.model, **found.sensitivity.for_plan), found

    def fit_and_encode(self, work: Workspace, plan: Plan, calibration: Calibration | None) -> None:
        """Fit every codebook group and encode its matrices; with calibration, encode after all are fitted."""
        outputs = None if calibration is None else calibration.outputs
        encoder = MatrixEncoder(work, self.source, plan, self.device, outputs)
        groups, ranks = list(plan.groups().items()), self.ranks

        def fitted(number: int) -> dict[str, MatrixCodec]:
            which = f"codebook {number + 1} of {len(groups)} ({groups[number][0].split('|')[0]})"
            on_progress = partial(_tell, self.progress, "fit", detail=which)
            return fitted_codecs(work, self.source, plan, number, self.device, on_progress)

        if ranks.size > 1:
            for number in ranks.mine(range(len(groups)), lambda n: sum(m.weights for m in groups[n][1])):
                fitted(number)
            ranks.sync_files(work.folder, [codebook_unit(number) for number in range(len(groups))])
        if calibration is None:
            own = {m.name for m in ranks.mine(plan.matrices, lambda m: m.weights)}
            for number, (_, group) in enumerate(groups):
                encoder.codecs = fitted(number)
                for matrix in (m for m in group if m.name in own):
                    self.progress(Event("encode", encoder.share, matrix.name))
                    encoder.encode(matrix)
                    encoder.passed += matrix.weights
        else:
            for number in range(len(groups)):
                encoder.codecs.update(fitted(number))
            encode_calibrated(
                encoder,
                calibration.windows,
                calibration.sensitivity,
                partial(_tell, self.progress, "encode"),
                kept=calibration.kept,
                token_weights=calibration.token_weights,
                ranks=ranks,
            )
        self.progress(Event("encode", 1.0, f"{plan.weights:,} weights"))


def _ignore(event: Event) -> None:
    """No progress is shown."""


def _tell(progress: ProgressCallback, stage: str, share: float, detail: str) -> None:
    progress(Event(stage, share, detail))
