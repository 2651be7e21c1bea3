"""Kills at random moments: the same command, run again, must end in the same bytes and leave nothing else."""

from __future__ import annotations

import hashlib
import random
import shutil
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import pocketllm
from tests import tiny
from tests.campaign.child import run
from tests.campaign.models import Models, distill_settings, lora_settings, settings

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


def campaign(models: Models, place: Path, count: int, seed: int) -> dict[str, Any]:
    """Kill `count` runs, one to three times each.

    Args:
        place: a folder to work in.

    Returns:
        Counts, and all runs that did not end in the same bytes.
    """
    random_, notes = random.Random(seed), place.with_name(f"{place.name}.notes")
    jobs = _jobs(models)
    right, seconds = {}, {}
    for name, job in list(jobs.items())[:count]:
        _prepare(name, models, place)
        begun = time.monotonic()
        ended = run(partial(job, place / "out"), notes, 600)
        seconds[name] = time.monotonic() - begun
        assert ended.kind == "returned", ended
        right[name] = _digest(place)
    counts: Counter[str] = Counter()
    by_job: Counter[str] = Counter()
    bad = []
    for number in range(count):
        name = list(jobs)[number % len(jobs)]
        _prepare(name, models, place)
        kills, after, again = random_.randint(1, _MOST_KILLS), [], partial(jobs[name], place / "out")
        for _ in range(kills):
            after.append(round(random_.uniform(0, seconds[name]), 3))
            ended = run(again, notes, 600, kill_after=after[-1])
            counts[ended.kind] += 1
            if ended.kind != "killed":
                break
        if ended.kind == "killed":
            ended = run(again, notes, 600)
        by_job[name] += 1
        found = _digest(place)
        # The kill may have come when all was done; the rerun says then that the output already exists.
        is_done = ended.kind == "returned" or "already exists" in ended.text or "is not empty" in ended.text
        if not is_done or found != right[name]:
            differing = sorted(k for k in {*found, *right[name]} if found.get(k) != right[name].get(k))
            bad.append({"number": number, "job": name, "after": after, "kind": ended.kind})
            bad[-1] |= {"text": ended.text, "differing": differing}
    return {"count": count, "seed": seed, "ends": dict(counts), "jobs": dict(by_job), "bad": bad}


def _prepare(name: str, models: Models, place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
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
