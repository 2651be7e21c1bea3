"""Memory and time of training steps on a compressed model: LoRA on a dense and on a packed base, distillation with
the teacher run in every step and with its tokens cached. Writes results/training_cost.json.

    POCKETLLM_DATA=... python benchmarks/training_cost.py FOLDER [--steps 3] [--batch 4]
        [--context 256] [--runs NAME ...]

Each run is `pocketllm finetune` in a process of its own, whose peak memory is its own. Runs that were measured before
on the same model keep their figures.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import RESULTS, data_file, save

from pocketllm.format.checkpoint import read_report
from pocketllm.recover.base_model import identity

LORA, DISTILL = ("--method", "lora", "--set", "validation_items=4"), ("--set", "validation_windows=4")
RUNS = {
    "LoRA, dense base": LORA,
    "LoRA, packed base": (*LORA, "--set", "mode=packed"),
    "LoRA, packed base, from the output error": (*LORA, "--set", "mode=packed", "--set", "init=output_error"),
    "DoRA, dense base": (*LORA, "--set", "dora=true"),
    "DoRA, packed base": (*LORA, "--set", "mode=packed", "--set", "dora=true"),
    "distillation": DISTILL,
    "distillation, cached teacher": (*DISTILL, "--set", "teacher_top_k=64"),
}
KEPT = ("adapter_bytes", "base_bytes", "loss_before", "loss_stored", "kl_before", "kl_stored")
TEXT = ("wikitext2", "wiki.train.first_part.txt")


def measured(text: str, options: tuple[str, ...], chosen: argparse.Namespace) -> dict[str, Any]:
    """Peak memory, seconds per step and losses of a run."""
    sizes = ("--set", f"loop.batch_size={chosen.batch}", "--set", "loop.eval_every=1000")
    with tempfile.TemporaryDirectory() as scratch:
        output, words = Path(scratch) / "a", Path(scratch) / "t.txt"
        words.write_text(text, encoding="utf-8")
        line = [
            sys.executable,
            "-c",
            "from pocketllm.cli import main; main()",
            "finetune",
            str(chosen.folder),
        ]
        line += ["-o", str(output), "--text", str(words), "--json"]
        line += ["--steps", str(chosen.steps), "--context", str(chosen.context), *options, *sizes]
        running = subprocess.Popen(line, stdout=subprocess.PIPE, text=True)
        assert running.stdout is not None
        found = json.loads(running.stdout.read())
        _, status, usage = os.wait4(running.pid, 0)
        if status:
            sys.exit(f"{' '.join(line)}: ended with status {status}")
        log = (Path(scratch) / "a.log" / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = sorted(json.loads(entry)["seconds"] for entry in log)
    return {
        "peak_memory_bytes": usage.ru_maxrss * 1024,
        "step_seconds": seconds[0],
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        **{key: found[key] for key in KEPT if key in found},
    }


def main() -> None:
    """Measure the runs named on the command line, all by default."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", nargs="+", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--characters", type=int, default=200_000, help="of the text, from its start")
    chosen = parser.parse_args()
    report = read_report(chosen.folder)
    facts = {
        "model": report["model"],
        "identity": identity(report),
        "bpw_blocks": report["bpw_blocks"],
        "steps": chosen.steps,
        "batch": chosen.batch,
        "context": chosen.context,
    }
    text = data_file(*TEXT).read_text(encoding="utf-8")[: chosen.characters]
    path = RESULTS / "training_cost.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    runs = before.get("runs", {}) if {key: before.get(key) for key in facts} == facts else {}
    for name in chosen.runs:
        if name not in runs:
            runs[name] = measured(text, RUNS[name], chosen)
            print(name, runs[name], flush=True)
            save("training_cost", "python benchmarks/training_cost.py", {**facts, "runs": runs})


if __name__ == "__main__":
    main()
