"""A system that refuses: full disks, folders without permission, too little memory. Errors of ours, then a rerun."""

from __future__ import annotations

import random
import resource
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import pocketllm
from tests.campaign.child import Ended, run
from tests.campaign.models import Models, lora_settings, settings
from tests.campaign.runs import Plan

_NOBODY = 65534


def _jobs(models: Models) -> dict[str, Callable[[Path], Any]]:
    return {
        "compress": lambda out: pocketllm.compress(models.dense, settings(), out) and None,
        "finetune": lambda out: pocketllm.lora(models.small, out, lora_settings(models.text)) and None,
        "merge": lambda out: pocketllm.merge(models.small, models.adapter, out) and None,
        "export": lambda out: pocketllm.export(models.small, out, torch.bfloat16) and None,
    }


def campaign(models: Models, place: Path, plan: Plan) -> dict[str, Any]:
    """Let runs meet a fault of the system; those that a full disk stopped are run again with room.

    Args:
        place: a folder to work in.
    """
    jobs = _jobs(models)

    def one(random_: random.Random, place: Path) -> dict[str, Any]:
        name, fault = random_.choice(list(jobs)), random_.choice(("disk", "permission", "memory"))
        at, notes, job = place / "work", place / "notes", jobs[name]
        shutil.rmtree(at, ignore_errors=True)
        at.mkdir()
        out = at / "out"
        if fault == "disk":
            size = round(2 ** random_.uniform(6, 17))
            ended = run(partial(_with_files_of, size, partial(job, out)), notes, 600)
            what = f"files of at most {size} bytes"
            again = run(partial(job, out), notes, 600)
            if ended.kind == "refused" and again.kind != "returned":
                ended = again
        elif fault == "permission":
            at.chmod(0o555)
            ended = run(partial(job, out), notes, 600, user=_NOBODY)
            at.chmod(0o755)
            what = "a folder without permission"
        else:
            room = round(2 ** random_.uniform(18, 30))
            ended = run(partial(job, out), notes, 600, more_memory=room)
            what = f"{room} bytes more of memory"
        kind, bad = _kind(ended, fault), None
        if kind not in ("refused", "returned", "out of memory"):
            bad = {"job": name, "fault": what, "kind": kind, "text": ended.text}
        return {"ends": [f"{fault}: {kind}"], "job": name, "bad": bad}

    return plan.carry_out(one, place)


def _kind(ended: Ended, fault: str) -> str:
    """Python and torch say themselves that there is no memory, in whatever line that was."""
    words = ("MemoryError", "allocate memory", "can't start new thread", "bad_alloc", "not enough memory")
    if fault == "memory" and (ended.kind == "crash" or any(word in ended.text for word in words)):
        return "out of memory"
    return ended.kind


def _with_files_of(size: int, job: Callable[[], Any]) -> Any:
    import signal

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    usual, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        return job()
    finally:  # how the job ended must find room
        resource.setrlimit(resource.RLIMIT_FSIZE, (usual, most))
