"""The tables of `pocketllm eval`: the models, perplexity and KL, and their tasks side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from pocketllm.cli.render import number, size


def eval_tables(values: Mapping[str, Any]) -> list[Table | str]:
    """Everything measured, from the command's JSON values."""
    shown: list[Table | str] = [_described(values)]
    if values["against"]:
        shown.append(f"against: {_described(values['against'])}")
    if values["perplexity"] is not None:
        shown += _text_tables(values)
    if values["tasks"]:
        shown.append(_task_table(values))
        shown += _notes(values)
    return shown


def _described(entry: Mapping[str, Any]) -> str:
    kind = f"compressed, {entry['matrices']} matrices verified" if entry["compressed"] else "not compressed"
    if entry["adapter"]:
        kind += f", with adapter {entry['adapter']} of {size(entry['adapter_bytes'])}"
    return f"{entry['model']}: {kind}; {size(entry['bytes_on_disk'])} on disk"


def _text_tables(values: Mapping[str, Any]) -> list[Table | str]:
    """Each text with what was measured on it, and the mean over several."""
    shown: list[Table | str] = []
    for found in values["texts"]:
        shown += [_convention(found), _text_table(found)]
    if len(values["texts"]) > 1:
        shown += [f"mean over {len(values['texts'])} texts (perplexity: geometric)", _text_table(values)]
    return shown


def _convention(found: Mapping[str, Any]) -> str:
    """The text, context and windows that the values depend on."""
    windows = f"context {found['context']}, {found['windows']} windows, {found['tokens']} tokens"
    return f"{found['text']}: {windows}"


def _text_table(found: Mapping[str, Any]) -> Table:
    """found: of one text, or the values of the command with the mean over all."""
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_row("perplexity", f"{found['perplexity']:.3f}")
    if found["kl"] is not None:
        reference = found.get("reference_perplexity") or found["against"]["perplexity"]
        table.add_row("perplexity of the other", f"{reference:.3f}")
        table.add_row("KL(other || this), nats per token", number(found["kl"], found["kl_stderr"]))
        agreement = _percent(found["top1_agreement"], found["top1_agreement_stderr"])
        table.add_row("same most likely token", agreement)
    return table


def _task_table(values: Mapping[str, Any]) -> Table:
    other = values["against"]
    table = Table(title="zero-shot tasks (± standard error)")
    headers = ["task", "n", "metric", "this", *(["other", "difference"] if other else []), "chance"]
    for header in [*headers, "seconds"]:
        table.add_column(header, justify="left" if header in ("task", "metric") else "right")
    for name, result in values["tasks"].items():
        for metric in ("acc", "acc_norm"):
            if result[metric] is None:
                continue
            row = [name, str(result["n"]), metric, _percent(result[metric], result[f"{metric}_stderr"])]
            if other:
                theirs = other["tasks"][name]
                gap = values["difference"]["tasks"][name][metric]
                row += [_percent(theirs[metric], theirs[f"{metric}_stderr"]), _gap(gap)]
            chance = "" if result["chance"] is None else f"{result['chance']:.1%}"
            table.add_row(*row, chance, "cached" if result["cached"] else f"{result['seconds']:.0f}")
        for metric, entry in result["other"].items():
            row = [name, str(result["n"]), metric, number(entry["value"], entry["stderr"])]
            if other:
                theirs = other["tasks"][name]["other"][metric]
                gap = entry["value"] - theirs["value"]
                row += [
                    number(theirs["value"], theirs["stderr"]),
                    ("+" if gap >= 0 else "") + number(gap),
                ]
            table.add_row(*row, "", "")
    table.add_section()
    for title, key in (("average", "all"), ("paper's average", "paper")):
        mean = values["average"][key]
        if mean is not None:
            if mean.get("missing"):
                title += f" ({len(mean['tasks'])} of {len(mean['tasks']) + len(mean['missing'])})"
            row = [title, str(len(mean["tasks"])), "acc", _percent(mean["acc"], mean["stderr"])]
            if other:
                base = other["average"][key]
                row += [_percent(base["acc"], base["stderr"]), _gap(values["difference"]["average"][key])]
            table.add_row(*row, f"{mean['chance']:.1%}", "")
    return table


def _notes(values: Mapping[str, Any]) -> list[str]:
    notes = []
    paper = values["average"]["paper"]
    if paper:
        missing = f"; not measured: {', '.join(paper['missing'])}" if paper["missing"] else ""
        notes.append(f"paper's average is over {', '.join(paper['tasks'])}{missing}")
    if values["against"]:
        notes.append("differences: standard error paired by document")
    if values["average"]["all"] and values["average"]["all"]["open"]:
        tasks = ", ".join(values["average"]["all"]["open"])
        notes.append(f"chance is 0 in the averages where answers are not chosen from a list: {tasks}")
    if values["limit"] is not None:
        notes.append(f"first {values['limit']} documents of each task; full figures differ")
    return notes


def _percent(value: float, error: float | None) -> str:
    return f"{value:.1%}" if error is None else f"{value * 100:.1f} ± {error:.1%}"


def _gap(gap: Mapping[str, Any]) -> str:
    spread = "" if gap["stderr"] is None else f" ± {gap['stderr'] * 100:.1f}"
    return f"{gap['difference'] * 100:+.1f}{spread}"
