"""Commands run in this process, jobs that are killed in a copy of it, and what folders hold afterwards."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pocketllm import cli

SETTINGS = ["--set", "vector_len=5", "--set", "codebook_size=32", "--set", "codebook_scope=kind"]
SETTINGS += ["--set", "codec.epochs=1", "--threads", "1"]
SIZES = {  # keys of a report that others rely on
    "bytes_on_disk",
    "ratio_files_bf16",
    "ratio_files_fp32",
    "ratio_matrices_bf16",
    "ratio_matrices_fp32",
    "bpw_blocks",
    "bpw_all",
    "matrices",
    "skipped",
}


class Run:
    """Runs commands in this process: exit code, stdout, stderr."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self.capsys, self.monkeypatch = capsys, monkeypatch

    def __call__(self, *arguments: str | Path) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["pocketllm", *map(str, arguments)])
        self.capsys.readouterr()
        try:
            cli.main()
            code: Any = 0
        except SystemExit as stop:
            code = stop.code
        out, err = self.capsys.readouterr()
        return int(code or 0), out, err

    def json(self, *arguments: str | Path) -> dict[str, Any]:
        code, out, err = self(*arguments, "--json")
        assert code == 0, err
        assert out.count("\n") == 1
        values: dict[str, Any] = json.loads(out)
        return values


def in_a_copy(job: Callable[[], object]) -> int:
    """Start a job in a fork of this process, seconds faster than a new process; the number of the fork.

    Its exit code is 0 where the job returns, 1 where it raises, and that of `SystemExit`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads, which the copy does not have
        child = os.fork()
    if child:
        return child
    code: Any = 1
    try:
        _threads_again()
        job()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        os._exit(code)


def _threads_again() -> None:
    """Make torch's pool of threads again in a fork, where the one it had is lost.

    torch does so when a thread first computes, but two threads that do so at once (transformers loads weights on
    several) may find no pool: "Invalid thread pool!".
    """
    torch.set_num_threads(torch.get_num_threads())


def killed(job: Callable[[], object]) -> None:
    """Run a job that kills its process (`kill_now`), in a fork of this one."""
    _, status = os.waitpid(in_a_copy(job), 0)
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL, status


def raised_in_a_copy(job: Callable[[], object]) -> str:
    """Run a job that must fail, in a fork of this process; the type and message of its exception."""
    reader, writer = os.pipe()

    def reported() -> None:
        try:
            job()
        except Exception as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
            raise

    child = in_a_copy(reported)
    os.close(writer)
    with os.fdopen(reader) as said:
        found = said.read()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 1, status
    return found


def on_ranks(size: int, job: Callable[[int], object], seconds: int = 120) -> list[int]:
    """Run a job in as many forks as torchrun would launch processes; their exit codes, -9 for one that was killed."""
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            child = os.fork()
        if not child:
            code = 1
            try:
                os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "localhost"}
                os.environ |= {"MASTER_PORT": str(port), "LOCAL_RANK": str(rank)}
                signal.alarm(seconds)  # nothing may hang
                _threads_again()
                job(rank)
                code = 0
            except SystemExit as stop:
                code = int(stop.code or 0)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def kill_now() -> None:
    """Kill this process as the system does it: nothing is cleaned up."""
    os.kill(os.getpid(), signal.SIGKILL)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file; folders within are left out."""
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()
    }
