"""Ours and the peer quantizers on one model, text, machine and evaluator.

    POCKETLLM_DATA=... python benchmarks/peers/run.py                     # everything that is not done yet
    POCKETLLM_DATA=... python benchmarks/peers/run.py --only hqq --redo   # a peer, or one setting, again
    POCKETLLM_DATA=... python benchmarks/peers/run.py --paired 3          # time and memory of two alone
    POCKETLLM_DATA=... python benchmarks/peers/run.py --model gemma-3-270m

Makes an environment for each peer, quantizes each setting in a process of its own, evaluates what comes out
with our evaluator, and writes benchmarks/results/peers.json (and peers_paired.json; with _MODEL for another model
than SmolLM2) and docs/peers.png, .svg.
Killed and started again, it goes on with the first setting that is not done.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from environments import environment, llamacpp, versions
from measure import CommandError, Cost, measured
from settings import CALIBRATION_TEXT, PAIRED, SAMPLE_TOKENS, SEED, SETTINGS, TEST_TEXT, Setting

from pocketllm.cache import cache_folder

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import SMOLLM2, SUBJECTS, Subject

HERE = Path(__file__).parent


class Bench:
    """Folders of a benchmark: environments in `tools`, calibration samples and a folder for each setting in `root`."""

    def __init__(self, subject: Subject, tools: Path, data: Path) -> None:
        self.subject, self.tools = subject, tools
        self.root = root = tools if subject is SMOLLM2 else tools / subject.name
        self.test_text = data.joinpath(*TEST_TEXT)
        self.calibration_text = data.joinpath(*CALIBRATION_TEXT)
        for path in (self.test_text, self.calibration_text):
            if not path.is_file():
                sys.exit(f"set POCKETLLM_DATA to a folder that holds {path.relative_to(data)}")
        self.calibration = root / "calibration"
        if not (self.calibration / "facts.json").is_file():
            script = HERE / "prepare.py"
            command = [sys.executable, script, subject.source, self.calibration_text, self.calibration]
            measured(command, root / "prepare.log")

    def work(self, setting: Setting) -> Path:
        """The folder of a setting."""
        return self.root / "runs" / setting.name

    def python(self, setting: Setting) -> Path:
        """The Python that a setting's peer runs in; ours is the one that runs this."""
        if setting.peer == "pocketllm":
            return Path(sys.executable)
        return environment(setting.peer, self.tools)

    def quantize(self, setting: Setting, work: Path) -> Cost:
        """Quantize from scratch; the job stands in job.json."""
        python = self.python(setting)
        options = dict(setting.options)
        if setting.peer == "pocketllm":
            options["calibration"] = str(self.calibration_text)
        if setting.peer == "llamacpp":
            options |= llamacpp(python, self.tools) | {"length": SAMPLE_TOKENS}
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        job = {
            "model": json.loads((self.calibration / "facts.json").read_text())["model"],
            "tokens": str(self.calibration / "tokens.json"),
            "text": str(self.calibration / "samples.txt"),
            "work": str(work),
            "options": options,
            "seed": SEED,
        }
        path = work / "job.json"
        path.write_text(json.dumps(job, indent=1))
        return measured([python, _adapter(setting), "quantize", path], work / "quantize.log")

    def make(self, setting: Setting) -> None:
        """Quantize, dequantize and evaluate, whatever of it is not done yet."""
        work = self.work(setting)
        if not (work / "cost.json").is_file():
            print(f"{setting.title}: quantizing", flush=True)
            self.keep(setting, self.quantize(setting, work))
        if not (work / "bits.json").is_file():
            job = work / "job.json"
            measured([self.python(setting), _adapter(setting), "dequantize", job], work / "dequantize.log")
        self.evaluate(work / "dense", work / "evaluation.json", setting.title)

    def keep(self, setting: Setting, cost: Cost) -> None:
        """Note what quantizing has cost, and with which packages."""
        facts = {**cost.to_dict(), "versions": versions(self.python(setting))}
        (self.work(setting) / "cost.json").write_text(json.dumps(facts, indent=1))

    def evaluate(self, dense: Path, result: Path, title: str) -> None:
        """Evaluate a dense folder, unless it is done."""
        if not result.is_file():
            print(f"{title}: evaluating", flush=True)
            script, logits = HERE / "evaluate.py", self.root / "dense-logits"
            command = [
                str(script),
                self.subject.name,
                str(dense),
                str(self.test_text),
                str(result),
                str(logits),
            ]
            measured([sys.executable, *command], result.with_suffix(".log"))

    def paired(self, repeats: int) -> None:
        """Quantize with each of PAIRED in turn, the first of a pair changing; write peers_paired.json.

        The last run of each is its row among the others, too.
        """
        pair = [setting for setting in SETTINGS if setting.name in PAIRED]
        runs: list[dict[str, Any]] = []
        for number in range(repeats):
            for setting in pair if number % 2 == 0 else reversed(pair):
                cost = self.quantize(setting, self.work(setting))
                self.keep(setting, cost)
                runs.append({"setting": setting.name, "repeat": number, **cost.to_dict()})
                print(json.dumps(runs[-1]), flush=True)
        path = self.root / "paired.json"
        path.write_text(json.dumps(runs, indent=1))
        subprocess.run(
            [sys.executable, HERE / "report.py", "paired", self.subject.name, self.root], check=True
        )
        for setting in pair:
            self.make(setting)


def _adapter(setting: Setting) -> Path:
    return HERE / f"adapt_{setting.peer}.py"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=SUBJECTS, default=SMOLLM2.name)
    parser.add_argument("--only", nargs="+", metavar="PEER_OR_SETTING", help="these alone")
    parser.add_argument("--redo", action="store_true", help="forget what is there of them")
    parser.add_argument("--paired", type=int, metavar="N", help="N paired runs for time and memory, only")
    parser.add_argument("--cache", type=Path, default=cache_folder() / "peers", help="environments and runs")
    return parser.parse_args()


def main() -> int:
    """Do what is not done, then report; 1 if a setting failed."""
    arguments = _arguments()
    bench = Bench(
        SUBJECTS[arguments.model], arguments.cache.resolve(), Path(os.environ.get("POCKETLLM_DATA", ""))
    )
    dense = json.loads((bench.calibration / "facts.json").read_text())["model"]
    bench.evaluate(Path(dense), bench.calibration / "dense.json", "dense model")
    failed = 0
    if arguments.paired:
        bench.paired(arguments.paired)
    for setting in SETTINGS:
        if arguments.paired or (arguments.only and not {setting.name, setting.peer} & set(arguments.only)):
            continue
        if arguments.redo:
            shutil.rmtree(bench.work(setting), ignore_errors=True)
        try:
            bench.make(setting)
        except CommandError as error:
            failed += 1
            print(f"{setting.title}: failed\n{error}", file=sys.stderr, flush=True)
            (bench.work(setting) / "failure.txt").write_text(str(error))
    subprocess.run([sys.executable, HERE / "report.py", "peers", bench.subject.name, bench.root], check=True)
    if bench.subject is SMOLLM2:
        subprocess.run([environment("figure", bench.tools), HERE / "figure.py"], check=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
