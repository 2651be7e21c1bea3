"""Jobs in child processes: forked, so that what is imported is imported once; limited in time and memory."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pocketllm.errors import PocketError

Job = Callable[[], Any]


@dataclass(frozen=True)
class Ended:
    """How a job ended.

    kind: `returned` (value), `refused` (an error of ours), `traceback`, `crash` (a signal that nobody sent),
    `killed` (on purpose) or `hang`.
    """

    kind: str
    value: Any = None
    text: str = ""


def run(
    job: Job,
    notes: Path,
    seconds: float = 120.0,
    kill_after: float | None = None,
    more_memory: int | None = None,
    user: int | None = None,
) -> Ended:
    """Run a job in a child process.

    Args:
        job: what it returns must be plain JSON types. notes: a file for what it says, which is replaced.
        seconds: after which it is called a hang. kill_after: seconds after which it is killed on purpose.
        more_memory: bytes of address space beyond what is in use. user: number of the user to run as.
    """
    notes.unlink(missing_ok=True)
    process = os.fork()
    if process == 0:
        try:
            _child(job, notes, more_memory, user)
        finally:
            os._exit(1)  # whatever happens, a child does not go on as its parent
    begun = time.monotonic()
    limit = seconds if kill_after is None else min(seconds, kill_after)
    while True:
        done, status = os.waitpid(process, os.WNOHANG)
        if done:
            return _ended(status, notes)
        if time.monotonic() - begun > limit:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return Ended("hang" if kill_after is None or limit < kill_after else "killed")
        time.sleep(0.005)


def _child(job: Job, notes: Path, more_memory: int | None, user: int | None) -> None:
    """Never returns."""
    torch.set_num_threads(1)  # a pool of threads does not survive a fork; here it is made anew, by one thread
    silent = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silent, stream)
    with notes.open("w", encoding="utf-8", errors="backslashreplace") as stream:
        try:
            if more_memory is not None:
                pages = int(Path("/proc/self/statm").read_text().split()[0])
                resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more_memory,) * 2)
            if user is not None:
                os.setuid(user)
            result = {"kind": "returned", "value": job()}
        except PocketError as error:
            result = {"kind": "refused", "text": f"{type(error).__name__}: {error}"}
        except BaseException:
            result = {"kind": "traceback", "text": traceback.format_exc()}
        json.dump(result, stream)
    os._exit(0)


def _ended(status: int, notes: Path) -> Ended:
    if os.WIFSIGNALED(status):
        return Ended("crash", text=signal.Signals(os.WTERMSIG(status)).name)
    try:
        return Ended(**json.loads(notes.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return Ended("crash", text="ended without a result")


def command(*arguments: str | Path) -> Job:
    """A job that runs the command line in its process; what it refuses counts as an error of ours.

    It returns what the command has printed as JSON.
    """

    def job() -> Any:
        import io
        from contextlib import redirect_stderr, redirect_stdout

        from pocketllm import cli

        sys.argv = ["pocketllm", *map(str, arguments), "--json", "--quiet"]
        out, err = io.StringIO(), io.StringIO()
        try:
            with redirect_stdout(out), redirect_stderr(err):
                cli.main()
        except SystemExit as stop:
            if stop.code in (1, 2):
                raise PocketError(err.getvalue()) from None
            if stop.code not in (0, None):
                raise
        return json.loads(out.getvalue().splitlines()[-1])

    return job
