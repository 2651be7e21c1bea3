"""Zero-shot tasks, perplexity and divergence of compressed models beside the dense one.

    POCKETLLM_DATA=... python benchmarks/tasks.py [--model smollm2-135m] [NAME=FOLDER ...] [--limit N] [--tasks NAMES]

NAME is what the table calls the compressed model in FOLDER. The dense model is always measured. Tasks are
those whose files POCKETLLM_DATA holds; perplexity and divergence: WikiText-2 raw test, context 1024, first 16
windows (Gemma: 6). Models measured before with the same settings keep their figures; single tasks are kept in the
cache, so a stopped run goes on. Writes results/tasks.json, or tasks_MODEL.json of another model than SmolLM2.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import CONTEXT, RESULTS, SMOLLM2, SUBJECTS, Subject, data_file, save

from pocketllm.format.checkpoint import read_report


def measure(subject: Subject, model: str, tasks: str, limit: int, *options: str) -> dict[str, Any]:
    """`pocketllm eval`, in a process of its own."""
    command = [sys.executable, "-c", "from pocketllm.cli import main; main()", "eval", model, "--json"]
    command += ["--ppl", str(data_file("wikitext2", "wiki.test.raw")), "--context", str(CONTEXT)]
    command += ["--windows", str(subject.windows), "--tasks", tasks, "--limit", str(limit), *options]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    for key in ("model", "text", "texts", "window_kl"):
        found.pop(key)
    for entry in (found, found["against"] or {}):
        for task in (entry.get("tasks") or {}).values():
            task.pop("cached")
    return found


def compressed(subject: Subject, name: str, folder: Path, tasks: str, limit: int) -> dict[str, Any]:
    """One compressed model beside the dense one, with what its report says of its size."""
    found = measure(subject, str(folder), tasks, limit, "--against", subject.source)
    del found["against"]
    report = read_report(folder)
    sizes = {
        key: report[key] for key in ("bpw_blocks", "bpw_matrices", "ratio_files_bf16", "ratio_files_fp32")
    }
    return {"name": name, **sizes, **found}


def main() -> None:
    """Measure the models named on the command line; others keep their earlier figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=SUBJECTS, default=SMOLLM2.name)
    parser.add_argument("models", nargs="*", metavar="NAME=FOLDER")
    parser.add_argument("--limit", type=int, default=0, help="first documents of each task; 0 takes all")
    parser.add_argument("--tasks", default="local")
    chosen = parser.parse_args()
    subject = SUBJECTS[chosen.model]
    path = RESULTS / f"{subject.results('tasks')}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    dense = measure(subject, subject.source, chosen.tasks, chosen.limit)
    models = before.get("models", {}) if before.get("limit") == dense["limit"] else {}
    if any(set(entry["tasks"]) != set(dense["tasks"]) for entry in models.values()):
        models = {}
    for argument in [None, *chosen.models]:
        if argument is not None:
            name, _, folder = argument.partition("=")
            models[name] = compressed(subject, name, Path(folder), chosen.tasks, chosen.limit)
            print(name, models[name]["perplexity"], models[name]["kl"], models[name]["average"], flush=True)
        values = {
            "model": subject.source,
            "text": "WikiText-2 raw test",
            "context": CONTEXT,
            "windows": subject.windows,
            "limit": dense["limit"],
            "dtype": dense["dtype"],
            "dense": dense,
            "models": models,
        }
        option = "" if subject is SMOLLM2 else f" --model {subject.name}"
        save(subject.results("tasks"), f"python benchmarks/tasks.py{option}", values)


if __name__ == "__main__":
    main()
