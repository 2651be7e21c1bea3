"""Kills at random moments: the same command, run again, must end in the same bytes and leave nothing else."""

from __future__ import annotations

import contextlib
import hashlib
import random
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import pocketllm
from tests import tiny
from tests.campaign.child import run
from tests.campaign.models import Models, distill_settings, lora_settings, settings
from tests.campaign.runs import Plan

_MOST_KILLS = 3  # of one run, before it may finish


def _jobs(models: Models) -> dict[str, Callable[[Path], Any]]:
    """Name -> what makes an output at a path; each is what one command does."""
    adapter, small = models.adapter, models.small
    return {
        "compress": lambda out: pocketllm.compress(models.dense, settings(), out) and None,
        "compress, calibrated": lambda out: (
            pocketllm.compress(models.dense, tiny.calibrated(settings()), out) and None
        ),
        "compress --overwrite": lambda out: (
            pocketllm.compress(models.dense, settings(), out, overwrite=True) and None
        ),
        "finetune, distill": lambda out: (
            pocketllm.distill(small, out, distill_settings(models.text), teacher=str(models.dense)) and None
        ),
        "finetune, lora": lambda out: pocketllm.lora(small, out, lora_settings(models.text)) and None,
        "merge": lambda out: pocketllm.merge(small, adapter, out) and None,
        "merge --reencode": lambda out: (
            pocketllm.merge(small, adapter, out, reencode=True, text=models.text, context=16, windows=2)
            and None
        ),
        "export": lambda out: pocketllm.export(small, out, torch.bfloat16) and None,
    }


def campaign(models: Models, place: Path, plan: Plan) -> dict[str, Any]:
    """Kill runs at random moments, one to three times each, then let them finish.

    Args:
        place: a folder to work in.

    Returns:
        Counts, and all runs that did not end in the same bytes.
    """
    jobs = _jobs(models)
    right, seconds = {}, {}
    for name, job in list(jobs.items())[: plan.count]:
        for each in (lambda job, notes: job(), _timed):  # the first time imports are made here
            _prepare(name, models, place / "unbroken")
            seconds[name] = each(partial(_in_folder, place / "unbroken", job), place / "notes")
        right[name] = _digest(place / "unbroken")

    def one(random_: random.Random, place: Path) -> dict[str, Any]:
        name = random_.choice(list(right))
        at, notes = place / "work", place / "notes"
        again = partial(_in_folder, at, jobs[name])
        _prepare(name, models, at)
        after: list[float] = []
        ends = []
        for _ in range(random_.randint(1, _MOST_KILLS)):
            after.append(round(random_.uniform(0, seconds[name]), 3))
            ended = run(again, notes, 600, kill_after=after[-1])
            ends.append(ended.kind)
            if ended.kind != "killed":
                break
        if ended.kind == "killed":
            ended = run(again, notes, 600)
        found = _digest(at)
        # The kill may have come when all was done; the rerun says then that the output already exists.
        is_done = ended.kind == "returned" or "already exists" in ended.text or "is not empty" in ended.text
        bad: dict[str, Any] | None = None
        if not is_done or found != right[name]:
            differing = sorted(k for k in {*found, *right[name]} if found.get(k) != right[name].get(k))
            bad = {
                "job": name,
                "after": after,
                "kind": ended.kind,
                "text": ended.text,
                "differing": differing,
            }
        return {"ends": ends, "job": name, "bad": bad}

    return plan.carry_out(one, place)


def _in_folder(folder: Path, job: Callable[[Path], Any]) -> Any:
    """Make the output `out` in a folder: reports so name no other paths from run to run."""
    with contextlib.chdir(folder):
        return job(Path("out"))


def _timed(job: Callable[[], Any], notes: Path) -> float:
    """Seconds that a job takes in a child process."""
    begun = time.monotonic()
    ended = run(job, notes, 600)
    assert ended.kind == "returned", ended
    return time.monotonic() - begun


def _prepare(name: str, models: Models, place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    if name == "compress --overwrite":
        shutil.copytree(models.small, place / "out")
        (place / "out" / "LICENSE").write_text("of the old one")


def _digest(place: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder but the records of runs, which say how long they took."""
    return {
        path.relative_to(place).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(place.rglob("*"))
        if path.is_file() and "out.log" not in path.parts
    } | {f"{path.name}/": "" for path in place.iterdir() if path.is_dir()}
