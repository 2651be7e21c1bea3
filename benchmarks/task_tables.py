"""The table of zero-shot tasks."""

from __future__ import annotations

from typing import Any

from common import GEMMA, SMOLLM2, Subject
from pages import load_results, markdown_table, optional_results
from peers.table import number

_TASK_TITLES = {
    "winogrande": "WinoGrande",
    "piqa": "PIQA",
    "hellaswag": "HellaSwag",
    "arc_easy": "ARC-E",
    "arc_challenge": "ARC-C",
    "boolq": "BoolQ",
    "openbookqa": "OBQA",
    "lambada_openai": "LAMBADA",
}


def tasks() -> str:
    """Zero-shot accuracy of compressed models beside the dense one; the differences in brackets."""
    gemma = optional_results(GEMMA.results("tasks"))
    parts = [_tasks(SMOLLM2, load_results("tasks"))]
    return "\n\n".join(parts if gemma is None else [*parts, _tasks(GEMMA, gemma)])


def _tasks(subject: Subject, found: dict[str, Any]) -> str:
    dense = found["dense"]
    names = [name for name in _TASK_TITLES if name in dense["tasks"]]
    names += [name for name in dense["tasks"] if name not in _TASK_TITLES]
    rows = [
        ["dense (bf16)", "16", f"{dense['bytes_on_disk'] / 1e6:.1f}", f"{dense['perplexity']:.2f}", "", ""]
    ]
    rows[0] += [f"{dense['tasks'][n]['acc']:.1%} ± {dense['tasks'][n]['acc_stderr']:.1%}" for n in names]
    rows[0] += [f"{dense['average']['all']['acc']:.1%} ± {dense['average']['all']['stderr']:.1%}", ""]
    for name, entry in found["models"].items():
        gaps = entry["difference"]
        mean = gaps["average"]["all"]
        kept = mean["margin_kept"]
        rows.append(
            [
                name,
                f"{entry['bpw_blocks']:.2f}",
                f"{entry['bytes_on_disk'] / 1e6:.1f}",
                number(entry["perplexity"]),
                f"{entry['kl']:.3f}",
                f"{entry['top1_agreement']:.1%}",
                *(_beside(entry["tasks"][n]["acc"], gaps["tasks"][n]["acc"]) for n in names),
                _beside(entry["average"]["all"]["acc"], mean),
                "" if kept is None else f"{kept:.0%}",
            ]
        )
    head = ["model", "bpw of blocks", "MB on disk", "perplexity", "KL, nats", "top-1 agreement"]
    head += [*(_TASK_TITLES.get(name, name) for name in names), "average", "margin over chance kept"]
    which = "all documents" if found["limit"] is None else f"the first {found['limit']} documents of each"
    version = dense["tasks"][names[0]]["versions"]["lm-eval"]
    seconds = sum(task["seconds"] for task in dense["tasks"].values())
    note = (
        f"{subject.title}. Tasks: lm-eval {version}, zero-shot, acc, {which} ({seconds:.0f} seconds per model); "
        "in brackets the difference from dense with its standard error, paired by document. Perplexity and KL: "
        f"{found['text']}, context {found['context']}, first {found['windows']} windows. Evaluated in "
        f"{found['dtype'].removeprefix('torch.')}. `{found['command']}`"
    )
    return "\n\n".join(filter(None, [markdown_table(head, rows), _without_guessing(found), note]))


def _without_guessing(found: dict[str, Any]) -> str:
    """Tasks in which the dense model does no better than guessing say nothing; the means without them."""
    tasks = found["dense"]["tasks"]
    informative = [name for name, task in tasks.items() if task["acc"] - task["acc_stderr"] > task["chance"]]
    if len(informative) in (0, len(tasks)):
        return ""
    rest = ", ".join(_TASK_TITLES.get(name, name) for name in tasks if name not in informative)
    chance = sum(tasks[name]["chance"] for name in informative) / len(informative)
    models = {"dense": found["dense"], **found["models"]}
    means = {
        name: sum(m["tasks"][t]["acc"] for t in informative) / len(informative) for name, m in models.items()
    }
    margin = means["dense"] - chance
    parts = [
        f"{name} {mean:.1%} ({(mean - chance) / margin:.0%} of the margin)" for name, mean in means.items()
    ]
    return (
        f"The dense model is not above guessing by more than a standard error in {rest}: a change there says "
        f"nothing about quality. Mean of the others, where guessing scores {chance:.1%}: {'; '.join(parts)}."
    )


def _beside(value: float, gap: dict[str, float]) -> str:
    return f"{value:.1%} ({gap['difference'] * 100:+.1f} ± {gap['stderr'] * 100:.1f})"


def calibration_texts() -> str:
    """What the calibration text changes, by the text that the model is judged on."""
    found = load_results("calibration_texts")
    judged = list(next(iter(found["rows"].values()))["texts"])
    rows = []
    for name, row in found["rows"].items():
        each = [row["texts"][text] for text in judged]
        shown = [f"{t['perplexity'] / t['dense_perplexity']:.2f}, {t['kl']:.3f}" for t in each]
        mean = f"{sum(t['kl'] for t in each) / len(each):.3f}"
        rows.append([name, *shown, mean, f"{row['accuracy']['all']['acc']:.1%}"])
    dense = next(iter(found["rows"].values()))["dense_accuracy"]["all"]
    error = max(t["kl_stderr"] for row in found["rows"].values() for t in row["texts"].values())
    note = (
        f"SmolLM2-135M at {found['bpw']} bits per weight of the blocks, before recovery. Cells: perplexity over the "
        f"dense one, and KL divergence in nats (standard errors up to {error:.3f}), on {found['windows']} windows of "
        f"{found['context']} tokens not calibrated on and of no test set. Tasks: mean accuracy in PIQA "
        f"and ARC-Easy, {found['questions']} questions each; dense {dense['acc']:.1%} ± {dense['stderr']:.1%}. One run "
        f"each. `{found['command']}`"
    )
    head = ["calibrated on", *judged, "mean KL", "tasks"]
    return f"{markdown_table(head, rows)}\n\n{note}"
