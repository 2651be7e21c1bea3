"""Processor time of calibrated compression by stage: SmolLM2-135M at 3.05 bits per weight of the blocks.

    POCKETLLM_DATA=... python benchmarks/stage_time.py

The settings are those of `benchmarks/peers/run.py` for the same target. Stages are those of the progress callback. The
time of encoding is divided further by timing the functions it consists of, on whatever thread they run: the search for
paths, feedback along the columns and down the rows, factors of Hessians; the rest is passes of blocks, the fit of row
scales, decoding and reading. Calibrated on the first part of WikiText-2's train text. Writes results/stage_time.json.
"""

from __future__ import annotations

import dataclasses
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common import SMOLLM2, data_file, quiet, save

import pocketllm
from pocketllm.codec import feedback_schedule
from pocketllm.codec.kernels import select
from pocketllm.compression import Event, encode_blocks, matrix_encoder
from pocketllm.config import DEFAULT_PRESET

BPW = 3.05


class Clock:
    """Processor seconds by stage, and within the stage `encode` by function.

    A function that runs inside another timed one is not counted twice. Threads that a function starts are not counted.
    On two cores, functions that encode matrices start none; passes of blocks and the factors of Hessians of inputs do.
    """

    def __init__(self) -> None:
        self.stages: dict[str, float] = defaultdict(float)
        self.functions: dict[str, float] = defaultdict(float)
        self.stage, self.since, self.lock = "start", time.process_time(), threading.Lock()
        self.inside = threading.local()

    def on_event(self, event: Event) -> None:
        """Close the running stage if another one begins."""
        now = time.process_time()
        self.stages[self.stage] += now - self.since
        is_end = event.stage == "encode" and "embed" in event.detail
        self.stage, self.since = "encode embedding" if is_end else event.stage, now

    def timed(self, owner: Any, name: str, label: str) -> None:
        """Replace a function by one that is timed under a label."""
        function: Callable[..., Any] = getattr(owner, name)

        def run(*args: Any, **keywords: Any) -> Any:
            if self.stage != "encode" or getattr(self.inside, "label", None):
                return function(*args, **keywords)
            self.inside.label, began = label, time.thread_time()
            try:
                return function(*args, **keywords)
            finally:
                self.inside.label = None
                with self.lock:
                    self.functions[label] += time.thread_time() - began

        setattr(owner, name, run)


def main() -> None:
    quiet()
    config, clock = pocketllm.preset(DEFAULT_PRESET), Clock()
    assert config.calibration is not None
    texts = (str(data_file("wikitext2", "wiki.train.first_part.txt")),)
    calibration = dataclasses.replace(config.calibration, texts=texts)
    config = dataclasses.replace(config, target_bpw=BPW, keep_embeddings=True, calibration=calibration)
    clock.timed(select, "cheapest_paths", "paths")
    for part in (feedback_schedule.ColumnFeedback, feedback_schedule.RowFeedback):
        clock.timed(part, "feed", "feedback")
    clock.timed(feedback_schedule.RowFeedback, "shift", "feedback")
    clock.timed(encode_blocks.Hessian, "factor", "factors")
    clock.timed(matrix_encoder.MatrixEncoder, "_measured", "errors and decoding")
    clock.timed(matrix_encoder.MatrixEncoder, "install", "errors and decoding")
    clock.timed(encode_blocks.BlockStream, "inputs", "inputs and their Hessians")
    clock.timed(encode_blocks.BlockStream, "run", "outputs of encoded blocks")
    with tempfile.TemporaryDirectory() as scratch:
        report = pocketllm.compress(
            SMOLLM2.source,
            config,
            Path(scratch, "out"),
            progress=clock.on_event,
            calibration_folder=Path(scratch, "measured"),
        )
    values = {
        "bpw": BPW,
        "seconds": report.seconds,
        "cpu_seconds_by_stage": dict(clock.stages),
        "cpu_seconds_of_encode": dict(clock.functions),
    }
    save("stage_time", "python benchmarks/stage_time.py", values)


if __name__ == "__main__":
    main()
