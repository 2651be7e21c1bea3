"""The paper's pipeline end to end, beside this project's default method at the same bytes. Writes results/paper.json.

    POCKETLLM_DATA=... python benchmarks/paper.py [--models M ...] [--presets P ...] [--rows VARIANT/METHOD ...]
        [--steps N] [--windows N] [--tasks-limit N]

For each model and preset `paper-*`, rows VARIANT/METHOD:

- published: the preset, the first three and last two blocks dense, as the authors leave them;
- every-block: the same with no block left dense;
- calibrated: the default method, all files as large as those of `published`;
- calibrated-large: the same, as large as `published` with its adapter;

each as compressed (`none`), with the paper's LoRA recipe (`lora`) or distilled (`distill`). Then perplexity and
divergence on WikiText-2 raw test, and the zero-shot tasks whose files POCKETLLM_DATA holds. LoRA learns
instructions, as in the paper; calibration and distillation use the texts of benchmarks/recovery.py; nothing sees
test text. Every step is a command in a process of its own, whose output is kept in WORK: stopped and started again,
it goes on. A row that was measured with the same settings is kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import CONTEXT, RESULTS, SMOLLM2, data_file, save

import recovery
from pocketllm.format.checkpoint import REPORT_NAME, folder_bytes, read_report

MODELS = ("builtin:smollm2-135m", "builtin:gemma-3-270m")
PRESETS = ("paper-8x", "paper-10x", "paper-16x")
ROWS = (
    "published/none",
    "published/lora",
    "every-block/none",
    "every-block/lora",
    "calibrated/none",
    "calibrated/lora",
    "calibrated/distill",
    "calibrated-large/distill",
)
EVERY_BLOCK = ("--set", "dense_first=0", "--set", "dense_last=0")
CALIBRATION = ("wikitext2", "wiki.train.first_part.txt")
KEPT = ("bytes_on_disk", "adapter_bytes", "perplexity", "kl", "kl_stderr", "top1_agreement", "average")


def compressed(model: str, preset: str, variant: str, chosen: argparse.Namespace) -> Path:
    """The folder of a compressed model; compresses it unless that is done."""
    place = chosen.work / _slug(model)
    folder: Path = place / f"{preset}-{variant}"
    if (folder / REPORT_NAME).is_file():
        return folder
    options = ["--preset", preset, *(EVERY_BLOCK if variant == "every-block" else ())]
    if variant.startswith("calibrated"):
        published = compressed(model, preset, "published", chosen)
        nbytes = folder_bytes(published)
        if variant == "calibrated-large":
            nbytes += _adapter_bytes(published)
        options = ["--size", str(nbytes), "--calibration", str(data_file(*CALIBRATION))]
        options += ["--calibration-cache", str(place / "measured")]
    place.mkdir(parents=True, exist_ok=True)
    recovery.command("compress", model, "-o", str(folder), *options, "--device", chosen.device)
    return folder


def _adapter_bytes(base: Path) -> int:
    """Bytes of an adapter by the paper's recipe."""
    output = base.with_name(base.name + "-planned")
    plan = recovery.command("finetune", str(base), "-o", str(output), *recovery.options("lora"), "--dry-run")
    return int(plan["adapter_bytes"])


def recovered(base: Path, method: str, chosen: argparse.Namespace) -> Path:
    """The folder of a recovery's result, named by what it depends on; runs it unless that is done."""
    steps = [] if chosen.steps is None else ["--steps", str(chosen.steps)]
    extra = vars(chosen)[method]
    digest = [hashlib.sha256(extra.encode()).hexdigest()[:6]] if extra else []
    run = base.with_name("-".join([base.name, method, *steps[1:], *digest]))
    if not recovery.is_finished(run):
        more = [*recovery.options(method), *steps, "--device", chosen.device, *shlex.split(extra)]
        recovery.command("finetune", str(base), "-o", str(run), *more)
    return run


def quality(model: str, chosen: argparse.Namespace, *more: str) -> dict[str, Any]:
    """Perplexity and tasks of a model, and with `--against` how it differs from the dense one."""
    text = ("--ppl", str(data_file(*recovery.TEST)), "--context", str(CONTEXT))
    tasks = () if chosen.no_tasks else ("--tasks", "local", "--limit", str(chosen.tasks_limit))
    how = ("--windows", str(chosen.windows), "--dtype", recovery.DTYPE, "--device", chosen.device)
    found = recovery.command("eval", model, *text, *tasks, *how, *more)
    facts = {key: found.get(key) for key in KEPT}
    facts["tasks"] = {
        name: {key: task[key] for key in ("acc", "acc_stderr", "chance", "n")}
        for name, task in (found["tasks"] or {}).items()
    }
    facts["difference"] = (found.get("difference") or {}).get("average")
    return facts


def measured(model: str, preset: str, row: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """One row of the table."""
    variant, _, method = row.partition("/")
    base = compressed(model, preset, variant, chosen)
    report = read_report(base)
    facts = {key: report[key] for key in ("bpw_blocks", "bpw_matrices", "ratio_files_bf16")}
    facts["base_bytes"] = folder_bytes(base)
    if method == "none":
        return {**facts, **quality(str(base), chosen, "--against", model)}
    run = recovered(base, method, chosen)
    trained = recovery.facts_of(run, base, method)
    adapter = ("--adapter", str(run)) if method == "lora" else ()
    found = quality(str(run if method == "distill" else base), chosen, "--against", model, *adapter)
    return {**facts, **found, "training": trained}


def _training(row: str, chosen: argparse.Namespace) -> dict[str, Any]:
    """The options that a row's recovery depends on."""
    method = row.partition("/")[2]
    return {} if method == "none" else {"steps": chosen.steps, "options": vars(chosen)[method]}


def _slug(model: str) -> str:
    """A model's name as that of a folder."""
    return model.rstrip("/").replace(":", "/").rpartition("/")[2]


def arguments() -> argparse.Namespace:
    """The command line; ends the program if a name is unknown."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--presets", nargs="+", default=list(PRESETS))
    parser.add_argument("--rows", nargs="+", default=list(ROWS), metavar="VARIANT/METHOD")
    parser.add_argument("--steps", type=int, help="steps of LoRA and distillation, instead of their defaults")
    parser.add_argument("--windows", type=int, default=SMOLLM2.windows, help="windows of the test text")
    parser.add_argument("--tasks-limit", type=int, default=400, help="documents of each task; 0 takes all")
    parser.add_argument("--no-tasks", action="store_true", help="perplexity and divergence alone")
    for method in ("lora", "distill"):
        parser.add_argument(f"--{method}", default="", help=f"more options of finetune --method {method}")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work", type=Path, default=Path("paper-runs"))
    parser.add_argument("--output", default="paper", help="name of the results")
    chosen = parser.parse_args()
    for option, known in (("presets", PRESETS), ("rows", ROWS)):
        wrong = sorted(set(getattr(chosen, option)) - set(known))
        if wrong:
            sys.exit(f"--{option}: unknown {wrong[0]}; known: {', '.join(known)}")
    return chosen


def main() -> None:
    """Measure what is named on the command line; everything else keeps its earlier figures."""
    chosen = arguments()
    path = RESULTS / f"{chosen.output}.json"
    models = json.loads(path.read_text(encoding="utf-8"))["models"] if path.is_file() else {}
    how = {"windows": chosen.windows, "tasks_limit": None if chosen.no_tasks else chosen.tasks_limit}
    failed: list[str] = []
    for model in chosen.models:
        entry = models.setdefault(model, {"rows": {}})
        if entry.get("dense", {}).get("settings") != how:
            entry["dense"] = {"settings": how, **quality(model, chosen)}
            _save(chosen.output, models)
        for preset in chosen.presets:
            for row in chosen.rows:
                name = f"{preset}/{row}"
                settings = {**how, **_training(row, chosen)}
                if entry["rows"].get(name, {}).get("settings") == settings:
                    continue
                try:
                    found = measured(model, preset, row, chosen)
                except (
                    subprocess.CalledProcessError
                ) as error:  # it has printed its message; go on with the next
                    failed.append(f"{model} {name}: {shlex.join(error.cmd)}")
                    continue
                entry["rows"][name] = {"settings": settings, **found}
                print(model, name, found["perplexity"], flush=True)
                _save(chosen.output, models)
    if failed:
        sys.exit("not measured:\n" + "\n".join(failed))


def _save(name: str, models: dict[str, Any]) -> None:
    values = {
        "text": "WikiText-2 raw test",
        "context": CONTEXT,
        "dtype": recovery.DTYPE,
        "models": models,
    }
    save(name, "python benchmarks/paper.py", values)


if __name__ == "__main__":
    main()
