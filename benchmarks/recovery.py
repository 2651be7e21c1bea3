"""Recovery of a compressed model by distillation and by LoRA: perplexity, bytes, time. Writes
results/recovery.json (results/recovery_MODEL.json for another model than SmolLM2).

    POCKETLLM_DATA=... python benchmarks/recovery.py NAME=FOLDER ... [--methods distill lora lora-text]
    POCKETLLM_DATA=... python benchmarks/recovery.py 2.05=b205 --methods distill --options="--device cuda --steps 300"
    POCKETLLM_DATA=... python benchmarks/recovery.py --model gemma-3-270m 3.0=g30 --methods distill
    POCKETLLM_DATA=... python benchmarks/recovery.py 2.05=b205 --methods distill --run 2.05:distill=b205-tuned

NAME is what the table calls the compressed model in FOLDER. Each run is `pocketllm finetune` in a process of
its own, into WORK/NAME-METHOD; stopped and started again, it goes on. `--run NAME:METHOD=FOLDER` names another
folder; a finished run in it is not repeated: its settings and its time are read from its report and its log.
`distill-labels` is distillation with `label_weight=0.3`. Trained on text that is not test text and validated
on WikiText-2's validation text; measured on WikiText-2 raw test, context 1024, first 16 windows (Gemma: 6), in
bfloat16.
What was measured before and did not change is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import CONTEXT, RESULTS, SMOLLM2, SUBJECTS, Subject, data_file, save

from pocketllm.evaluate.results import folder_digest
from pocketllm.format.checkpoint import REPORT_NAME, folder_bytes, read_report
from pocketllm.recover.adapter import RECORD_NAME, check_adapter
from pocketllm.recover.base_model import identity

DTYPE = "bfloat16"
TEST = ("wikitext2", "wiki.test.raw")
TEXTS = (
    ("wikitext2", "wiki.train.first_part.txt"),
    ("c4", "c4_prefix_completion.jsonl"),
    ("wikipedia_cal", "exllamav3_cal_wiki.txt"),
)
VALIDATION = ("wikitext2", "wiki.valid.near_raw.txt")
METHODS = ("distill", "distill-labels", "lora", "lora-text")
INSTRUCTIONS = (("instruct", "dolly_hhrlhf_train_small.jsonl"),)


def options(method: str) -> list[str]:
    """The options of `pocketllm finetune` for a method, beside its defaults."""
    texts = INSTRUCTIONS if method == "lora" else TEXTS
    found = [part for text in texts for part in ("--text", str(data_file(*text)))]
    if method.startswith("distill"):
        labels = ["--set", "label_weight=0.3"] if method == "distill-labels" else []
        return [*found, "--method", "distill", "--validation-text", str(data_file(*VALIDATION)), *labels]
    # The paper's recipe is three epochs; of the plain text as many tokens as the distillation sees.
    return [*found, "--method", "lora", *(["--steps", "100"] if method == "lora-text" else [])]


def command(*arguments: str) -> dict[str, Any]:
    """`pocketllm` in a process of its own; its JSON."""
    line = [sys.executable, "-c", "from pocketllm.cli import main; main()", *arguments, "--json"]
    done = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def quality(subject: Subject, model: str, *more: str) -> dict[str, float]:
    """Perplexity on the test text, and there the divergence from the dense model in nats per token."""
    text = ("--ppl", str(data_file(*TEST)), "--context", str(CONTEXT), "--windows", str(subject.windows))
    found = command("eval", model, *text, "--dtype", DTYPE, "--against", subject.source, *more)
    return {key: float(found[key]) for key in ("perplexity", "kl", "top1_agreement")}


def is_finished(folder: Path) -> bool:
    """Whether a run has made this folder."""
    return (folder / REPORT_NAME).is_file() or (folder / RECORD_NAME).is_file()


def facts_of(run: Path, base: Path, method: str) -> dict[str, Any]:
    """What a finished run says of itself; ends the program if it does not belong here."""
    if (run / RECORD_NAME).is_file():
        check_adapter(run, base)
        facts = {"method": "lora", **json.loads((run / RECORD_NAME).read_text(encoding="utf-8"))}
    else:
        facts = read_report(run).get("recover", {})
        if facts.get("base") != identity(read_report(base)):
            sys.exit(f"{run}: was not made from {base}")
    if facts["method"] != method.partition("-")[0]:
        sys.exit(f"{run}: was made by {facts['method']}, not by {method}")
    config = facts["config"]
    used = [*config["texts"], *filter(None, [config.get("validation_text")])]
    if any("test" in Path(text).name for text in used):
        sys.exit(f"{run}: has seen test text: {', '.join(used)}")
    config["texts"] = [_short(text) for text in config["texts"]]
    if config.get("validation_text"):
        config["validation_text"] = _short(config["validation_text"])
    kept = ("method", "steps", "best_step", "kl_before", "kl_after", "loss_before", "loss_after", "config")
    return {**{key: facts[key] for key in kept if key in facts}, **_logged(run)}


def _short(text: str) -> str:
    """A path below the data folder, or a file's name."""
    root = Path(os.environ["POCKETLLM_DATA"]).resolve()
    path = Path(text).resolve()
    return str(path.relative_to(root)) if path.is_relative_to(root) else path.name


def _logged(run: Path) -> dict[str, Any]:
    """Time, numbers and versions from the record beside a run."""
    log = run.with_name(run.name + ".log")
    lines = (log / "steps.jsonl").read_text(encoding="utf-8").splitlines()
    summary = json.loads((log / "summary.json").read_text(encoding="utf-8"))
    kept = ("trained_parameters", "training_windows", "training_items", "machine")
    return {
        "seconds": round(sum(json.loads(line)["seconds"] for line in lines), 1),
        **{key: summary[key] for key in kept if key in summary},
    }


def measured(subject: Subject, base: Path, run: Path, method: str) -> dict[str, Any]:
    """A finished run: its facts, bytes and perplexity."""
    facts = facts_of(run, base, method)
    is_adapter = (run / RECORD_NAME).is_file()
    nbytes = folder_bytes(run) + (folder_bytes(base) if is_adapter else 0)
    more = ("--adapter", str(run)) if is_adapter else ()
    return {
        **facts,
        "bytes_on_disk": nbytes,
        "added_bytes": nbytes - folder_bytes(base),
        **quality(subject, str(base if is_adapter else run), *more),
    }


def base_facts(subject: Subject, folder: Path, before: dict[str, Any]) -> dict[str, Any]:
    """A base, measured unless it was before; its runs, if it is the same one."""
    report = read_report(folder)
    if before.get("identity") == identity(report):
        return before
    sizes = ("bpw_blocks", "bpw_matrices", "bytes_on_disk", "ratio_files_bf16", "ratio_files_fp32")
    return {
        "identity": identity(report),
        **{key: report[key] for key in sizes},
        **quality(subject, str(folder)),
        "runs": {},
    }


def main() -> None:
    """Run and measure what is named on the command line; everything else keeps its earlier figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", choices=SUBJECTS, default=SMOLLM2.name)
    parser.add_argument("bases", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--methods", nargs="+", default=["distill", "lora"])
    parser.add_argument("--run", action="append", default=[], metavar="NAME:METHOD=FOLDER")
    parser.add_argument("--options", default="", help="more options of pocketllm finetune")
    parser.add_argument("--work", type=Path, default=Path("recovery-runs"))
    chosen = parser.parse_args()
    wrong = sorted(set(chosen.methods) - set(METHODS))
    if wrong:
        sys.exit(f"--methods: unknown {wrong[0]}; known: {', '.join(METHODS)}")
    folders = {name: Path(folder) for name, _, folder in (entry.partition("=") for entry in chosen.run)}
    subject = SUBJECTS[chosen.model]
    path = RESULTS / f"{subject.results('recovery')}.json"
    before = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    dense = before.get("dense_perplexity") or quality(subject, subject.source)["perplexity"]
    bases: dict[str, Any] = before.get("bases", {})
    for name, _, folder in (entry.partition("=") for entry in chosen.bases):
        base = Path(folder)
        entry = bases[name] = base_facts(subject, base, bases.get(name, {}))
        for method in chosen.methods:
            run = folders.get(f"{name}:{method}", chosen.work / f"{name}-{method}")
            if not is_finished(run):
                more = [*options(method), *shlex.split(chosen.options)]
                command("finetune", str(base), "-o", str(run), *more)
            files = folder_digest(run)
            if entry["runs"].get(method, {}).get("files") != files:
                entry["runs"][method] = {"files": files, **measured(subject, base, run, method)}
                print(name, method, entry["runs"][method], flush=True)
            _save(subject, dense, bases)


def _save(subject: Subject, dense: float, bases: dict[str, Any]) -> None:
    values = {
        "model": subject.source,
        "text": "WikiText-2 raw test",
        "context": CONTEXT,
        "windows": subject.windows,
        "dtype": DTYPE,
        "dense_perplexity": dense,
        "bases": bases,
    }
    option = "" if subject is SMOLLM2 else f" --model {subject.name}"
    save(subject.results("recovery"), f"python benchmarks/recovery.py{option}", values)


if __name__ == "__main__":
    main()
