"""Peak memory of calibrated compression, by stage, beside a process that has loaded nothing.

    POCKETLLM_DATA=... python benchmarks/peak_memory.py [--keep FOLDER] [MODEL ...]

Each model is compressed with the default preset at 3 bits per weight, embedding included, in a process of its own that
samples its resident memory. Part of it are pages of the mapped weight file, which the system can drop at any time; the
rest is anonymous. Calibrated on the first part of WikiText-2's train text. Writes results/peak_memory.json; models that
are not named keep their results. With --keep, an interrupted run is resumed, as are its samples.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
import threading
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import Any

from common import RESULTS, data_file, quiet, save

MODELS = ("builtin:gemma-3-270m", "builtin:smollm2-135m")
BPW = 3.0
_SECONDS = 0.01  # between samples


def resident() -> tuple[int, int]:
    """Resident bytes of this process, and those of them that map no file."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    total, anonymous = (int(re.search(rf"{key}:\s+(\d+)", status)[1]) for key in ("VmRSS", "RssAnon"))  # type: ignore[index]
    return 1024 * total, 1024 * anonymous


class Samples:
    """Largest resident memory by stage, sampled by a thread of its own and kept in a file."""

    def __init__(self, file: Path) -> None:
        self.stage, self.file = "start", file
        self.peaks: dict[str, list[int]] = json.loads(file.read_text()) if file.is_file() else {}
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Samples:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._ended.wait(_SECONDS):
            stage, known = self.stage, self.peaks.get(self.stage, [0, 0])
            self.peaks[stage] = [max(pair) for pair in zip(known, resident(), strict=True)]
            if self.peaks[stage] != known:
                self.file.write_text(json.dumps(self.peaks))


def child(model: str, folder: str) -> None:
    """Compress a model; print the peaks as JSON."""
    quiet()
    import torch
    import transformers  # noqa: F401

    import pocketllm
    from pocketllm.compression import Event

    nothing = resident()[0]
    config = pocketllm.preset(pocketllm.config.DEFAULT_PRESET)
    assert config.calibration is not None
    texts = (str(data_file("wikitext2", "wiki.train.first_part.txt")),)
    calibration = dataclasses.replace(config.calibration, texts=texts)
    config = dataclasses.replace(config, target_bpw=BPW, calibration=calibration)
    with Samples(Path(folder, "peaks.json")) as samples:

        def progress(event: Event) -> None:
            is_end = event.stage == "encode" and "embed" in event.detail
            samples.stage = "encode embedding" if is_end else event.stage

        report = pocketllm.compress(
            model, config, Path(folder, "out"), progress=progress, calibration_folder=Path(folder, "measured")
        )
    facts = {
        "nothing_loaded_bytes": nothing,
        "peak_bytes": max(total for total, _ in samples.peaks.values()),
        "peak_anonymous_bytes": max(anonymous for _, anonymous in samples.peaks.values()),
        "stages": {stage: list(peaks) for stage, peaks in samples.peaks.items()},
        "dense_bytes": report.dense_model_bytes_bf16,
        "bytes_on_disk": report.bytes_on_disk,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(facts))


def main() -> None:
    path = RESULTS / "peak_memory.json"
    found: dict[str, Any] = json.loads(path.read_text())["models"] if path.is_file() else {}
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--keep", help="folder for the runs")
    given = parser.parse_args()
    for model in given.models:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(given.keep or scratch, model.removeprefix("builtin:"))
            folder.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, __file__, "--child", model, str(folder)]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
        found[model] = json.loads(done.stdout.splitlines()[-1])
        print(model, found[model], flush=True)
        save("peak_memory", "python benchmarks/peak_memory.py", {"bpw": BPW, "models": found})


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*sys.argv[2:4])
    else:
        main()
