"""The steps of one compression: measure, fit, encode, write."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
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
from pocketllm.compression.memory_plan import MemoryPlan, can_plan, plan_memory
from pocketllm.compression.progress import Event, ProgressCallback, tell
from pocketllm.compression.write import write
from pocketllm.config import CompressConfig
from pocketllm.format import checkpoint as ckpt
from pocketllm.format.mapped_pages import keep_no_holes, return_freed
from pocketllm.format.output import is_published
from pocketllm.format.report import Report
from pocketllm.format.workspace import Workspace, locked
from pocketllm.machine import resident_bytes
from pocketllm.plan.matrices import Plan
from pocketllm.plan.sizes import PlannedModel
from pocketllm.plan.target import planned
from pocketllm.ranks import Ranks
from pocketllm.source.dense_checkpoint import DenseCheckpoint


@dataclass(frozen=True)
class CompressJob:
    """What is compressed, with which settings. model: the name the user gave. memory: see `within_memory`."""

    source: DenseCheckpoint
    config: CompressConfig
    model: str
    device: str
    calibration_folder: str | Path | None
    progress: ProgressCallback
    ranks: Ranks
    memory: MemoryPlan = field(default_factory=MemoryPlan)

    def within_memory(self, first: PlannedModel, text: CalibrationText | None) -> CompressJob:
        """The job with the way in which it keeps below the limit of memory, and with the peaks that are expected.

        Args:
            first: the plan before calibration.

        Raises:
            ConfigError: the limit cannot be kept.
        """
        return_freed()
        held = resident_bytes()
        if not can_plan(self.config, self.device, self.ranks.size, held) or text is None or held is None:
            return self
        if self.config.max_memory_gb is not None:
            keep_no_holes()
        return replace(self, memory=plan_memory(self.source, first.plan, text.windows, held))

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
        on_progress = partial(tell, self.progress, "measure", detail="sensitivity of every matrix")
        found = calibrate(
            self.source,
            text,
            self.config,
            self.device,
            folder,
            scratch,
            on_progress,
            self.ranks,
            self.memory.on_disk,
        )
        return_freed()
        return planned(self.source, self.config, self.model, **found.sensitivity.for_plan), found

    def fit_and_encode(self, work: Workspace, plan: Plan, calibration: Calibration | None) -> None:
        """Fit every codebook group and encode its matrices; with calibration, encode after all are fitted."""
        outputs = None if calibration is None else calibration.outputs
        encoder = MatrixEncoder(work, self.source, plan, self.device, outputs)
        encoder.at_once = self.memory.at_once
        encoder.activations = work.folder if self.memory.on_disk else None
        groups, ranks = list(plan.groups().items()), self.ranks

        def fitted(number: int) -> dict[str, MatrixCodec]:
            which = f"codebook {number + 1} of {len(groups)} ({groups[number][0].split('|')[0]})"
            on_progress = partial(tell, self.progress, "fit", detail=which)
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
                partial(tell, self.progress, "encode"),
                kept=calibration.kept,
                token_weights=calibration.token_weights,
                ranks=ranks,
            )
        self.progress(Event("encode", 1.0, f"{plan.weights:,} weights"))
