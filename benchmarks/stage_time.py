"""Processor time of calibrated compression by stage: SmolLM2-135M at 3.05 bits per weight of the blocks.

    POCKETLLM_DATA=... python benchmarks/stage_time.py

The settings are those of `benchmarks/peers/run.py` for the same target. Stages are those of the progress callback. The
functions of which they consist are timed on whatever thread they run. Calibrated on the first part of WikiText-2's
train text. Writes results/stage_time.json.
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

import torch
from common import SMOLLM2, data_file, quiet, save

import pocketllm
from pocketllm.calibrate import blocks, gradients, output_hessians, sensitivity, window_sums
from pocketllm.codec import feedback, feedback_schedule, hessian
from pocketllm.codec.kernels import select
from pocketllm.compression import Event, matrix_encoder
from pocketllm.config import DEFAULT_PRESET

BPW = 3.05


class Clock:
    """Processor seconds by stage, and by stage and function.

    What a timed function calls counts for the inner one. On the main thread, which waits while others encode, the time
    is that of the process; on other threads their own: on two cores, the functions start no more threads there.
    """

    def __init__(self) -> None:
        self.stages: dict[str, float] = defaultdict(float)
        self.functions: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self.stage, self.since, self.lock = "start", time.process_time(), threading.Lock()
        self.inside = threading.local()

    def on_event(self, event: Event) -> None:
        """Close the running stage if another one begins."""
        now = time.process_time()
        self.stages[self.stage] += now - self.since
        self.stage, self.since = event.stage, now

    def timed(self, owner: Any, name: str, label: str) -> None:
        """Replace a function by one that is timed under a label."""
        function: Callable[..., Any] = getattr(owner, name)

        def run(*args: Any, **keywords: Any) -> Any:
            is_main = threading.current_thread() is threading.main_thread()
            now = time.process_time if is_main else time.thread_time
            outer, self.inside.nested, began = getattr(self.inside, "nested", 0.0), 0.0, now()
            try:
                return function(*args, **keywords)
            finally:
                taken = now() - began
                with self.lock:
                    self.functions[self.stage][label] += taken - self.inside.nested
                self.inside.nested = outer + taken

        setattr(owner, name, run)


TIMED = (
    (select, "cheapest_paths", "search for paths"),
    (feedback_schedule.ColumnFeedback, "feed", "feedback"),
    (feedback_schedule.RowFeedback, "feed", "feedback"),
    (feedback_schedule.RowFeedback, "shift", "feedback"),
    (feedback._Problem, "_coded", "targets of the search, column by column"),
    (feedback._Problem, "scored", "row scales and losses"),
    (hessian, "factorize", "factors of Hessians"),
    (sensitivity, "triangular_root", "factors of Hessians"),
    (window_sums, "add_square", "sums for Hessians"),
    (output_hessians, "add_square", "sums for Hessians"),
    (blocks.BlockStream, "call", "passes of blocks"),
    (torch.autograd, "grad", "backward passes of blocks"),
    (gradients.Head, "backward", "passes of the head"),
    (matrix_encoder.MatrixEncoder, "_measured", "errors of encoded matrices"),
    (matrix_encoder.MatrixEncoder, "install", "decoding"),
)


def main() -> None:
    quiet()
    config, clock = pocketllm.preset(DEFAULT_PRESET), Clock()
    assert config.calibration is not None
    texts = (str(data_file("wikitext2", "wiki.train.first_part.txt")),)
    calibration = dataclasses.replace(config.calibration, texts=texts)
    config = dataclasses.replace(config, target_bpw=BPW, keep_embeddings=True, calibration=calibration)
    for owner, name, label in TIMED:
        clock.timed(owner, name, label)
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
        "cpu_seconds_by_function": {stage: dict(found) for stage, found in clock.functions.items()},
    }
    save("stage_time", "python benchmarks/stage_time.py", values)


if __name__ == "__main__":
    main()
