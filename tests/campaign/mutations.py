"""Damaged folders given to every command: nothing but the right result or an error of ours may come out."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pocketllm
from tests.campaign.child import Ended, Job, command, run
from tests.campaign.damage import damage
from tests.campaign.models import Models, facts, settings
from tests.campaign.runs import Plan

_WINDOW = ("--context", "16", "--windows", "2")
_MEMORY = 3 << 30  # bytes beyond what is in use; the models take a few millions


def _jobs(models: Models, folder: Path, out: Path) -> dict[str, dict[str, Job]]:
    """What is damaged -> command -> the job; `folder` is the damaged one."""
    text = ("--ppl", models.text, *_WINDOW)
    train = ("--text", models.text, "--context", "16", "--steps", "1", "--dry-run", "-o", out)
    return {
        "compressed": {
            "load": lambda: facts(folder),
            "verify": lambda: pocketllm.format.verify(folder) and None,
            "info": command("info", folder),
            "info --no-check": command("info", folder, "--no-check"),
            "eval": command("eval", folder, *text),
            "generate": command("generate", folder, "--prompt", "hello", "--max-new-tokens", "8"),
            "report": command("report", folder, "-o", out.with_suffix(".html")),
            "compare": command("compare", folder, models.small, "-o", out.with_suffix(".svg")),
            "merge": command("merge", folder, "--adapter", models.adapter, "--to", out),
            "export": command("export", folder, "--to", out),
            "finetune": command("finetune", folder, "--method", "lora", *train),
        },
        "adapter": {
            "info": command("info", models.small, "--adapter", folder),
            "eval": command("eval", models.small, "--adapter", folder, *text),
            "generate": command(
                *("generate", models.small, "--adapter", folder, "--prompt", "hello", "--max-new-tokens", "8")
            ),
            "merge": command("merge", models.small, "--adapter", folder, "--to", out),
            "report": command("report", models.small, "--adapter", folder, "-o", out.with_suffix(".html")),
        },
        "dense": {
            "compress": lambda: pocketllm.compress(folder, settings(), out).bytes_on_disk,
            "dry run": lambda: pocketllm.dry_run(folder, settings()).bytes_on_disk,
            "eval": command("eval", folder, *text),
            "generate": command("generate", folder, "--prompt", "hello", "--max-new-tokens", "8"),
            "finetune": command("finetune", models.small, "--teacher", folder, *train),
        },
    }


# What a command that ends well must have computed; the others only describe what the files say.
_COMPARED: Mapping[tuple[str, str], Callable[[Any], Any]] = {
    ("compressed", "load"): lambda value: value,
    ("compressed", "generate"): lambda value: value["text"],
    ("compressed", "eval"): lambda value: f"{value['perplexity']:.3f}",
}


def campaign(models: Models, place: Path, plan: Plan, seconds: float = 120.0) -> dict[str, Any]:
    """Damage folders and run a command on each.

    Args:
        place: a folder to work in. seconds: after which a command is called a hang.

    Returns:
        Counts by kind of end, and all ends that must not be.
    """
    right = _right(models, place / "undamaged")

    def one(random_: random.Random, place: Path) -> dict[str, Any]:
        folder = place / "damaged"
        table = _jobs(models, folder, place / "out")
        what = random_.choices(list(table), (6, 2, 2))[0]
        weights = [1 if name == "report" else 4 for name in table[what]]  # it draws pictures for a second
        name = random_.choices(list(table[what]), weights)[0]
        _fresh(_originals(models)[what], place)
        done = damage(folder, random_)
        ended = run(table[what][name], place / "notes", seconds, more_memory=_MEMORY)
        kind = _kind(ended, what, name, done, right)
        bad = None
        if kind not in ("refused", "right", "described"):
            bad = {"what": f"{what}: {name}", "damage": done, "kind": kind, "text": ended.text}
        return {"ends": [kind], "job": f"{what}: {name}", "bad": bad}

    return plan.carry_out(one, place)


def _originals(models: Models) -> dict[str, Path]:
    return {"compressed": models.small, "adapter": models.adapter, "dense": models.dense}


def _right(models: Models, place: Path) -> dict[tuple[str, str], Any]:
    """What the compared commands compute when all is well.

    Every command runs once in this process, which so imports what children would else import each time.
    """
    place.mkdir()
    found = {}
    for what, jobs in _jobs(models, place / "damaged", place / "out").items():
        for name, job in jobs.items():
            _fresh(_originals(models)[what], place)
            value = job()  # must not be refused: a refusal must come from the damage
            if (what, name) in _COMPARED:
                found[what, name] = _COMPARED[what, name](value)
    return found


def _kind(ended: Ended, what: str, name: str, done: str, right: Mapping[tuple[str, str], Any]) -> str:
    if ended.kind != "returned":
        return ended.kind
    if (what, name) not in _COMPARED or done.startswith("edit_and_sign"):
        return "described"  # a folder that somebody signs anew is another model
    return "right" if _COMPARED[what, name](ended.value) == right[what, name] else "silently wrong"


def _fresh(original: Path, place: Path) -> None:
    for path in place.iterdir():
        if path.is_dir() and not path.is_symlink():
            for entry in path.rglob("*"):
                if not entry.is_symlink():
                    entry.chmod(0o700)
            shutil.rmtree(path)
        else:
            path.unlink()
    shutil.copytree(original, place / "damaged")
