"""Several processes that compress one model together: the bytes of a single one, whichever rank does what."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import pocketllm
from pocketllm import cli
from pocketllm.errors import RankError
from pocketllm.format.workspace import Workspace
from pocketllm.rank_watch import on_failure
from tests import tiny
from tests.commands import Run, contents, kill_now, on_ranks

CASES = {
    "plain": ("llama", tiny.settings()),
    "sequential": ("llama", tiny.on_trellis()),
    "dense inputs": ("qwen3_moe", tiny.on_trellis(calibration={"sequential": False})),
    "dense inputs, refined": (
        "llama",
        tiny.on_trellis(calibration={"sequential": False, "refine_epochs": 1}),
    ),
    "refined": ("gemma3", tiny.on_trellis(calibration={"refine_epochs": 1})),
    "compensated": ("llama", tiny.on_trellis(calibration={"compensate": 1})),
    "experts": ("mixtral", tiny.on_trellis()),
    "experts, 2 and 4": ("mixtral", tiny.on_trellis()),
}


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=[] if name == "experts" else pytest.mark.large) for name in CASES]
)
def test_any_number_of_ranks_gives_the_same_bytes(case: str, tmp_path: Path) -> None:
    architecture, config = CASES[case]
    source = tiny.save(tmp_path / "dense", architecture)

    def compress(name: str) -> pocketllm.Report:
        place = tmp_path / name
        return pocketllm.compress(source, config, place, calibration_folder=tmp_path / f"{name}-measured")

    report = compress("one")
    for size in (3,) if case == "experts" else (2, 4):
        name = f"of-{size}"

        def job(rank: int, name: str = name) -> None:
            assert compress(name).bytes_on_disk == report.bytes_on_disk

        assert on_ranks(size, job) == [0] * size
        assert contents(tmp_path / name) == contents(tmp_path / "one")
        assert not (tmp_path / f"{name}.partial").exists()


def test_ranks_with_file_systems_of_their_own(source: Path, whole: Path, tmp_path: Path) -> None:
    """Every rank has other folders, as on machines that share none; the second run finds half of the work done."""

    def job(rank: int) -> None:
        place = tmp_path / str(rank)
        place.mkdir(exist_ok=True)
        compress(source, place / "out", calibration_folder=place / "measured")

    def broken(rank: int) -> None:
        at_save(2, kill_now)
        job(rank)

    codes = on_ranks(2, broken)
    assert -9 in codes and set(codes) <= {-9, 1}  # the first to be killed may end the other
    killed = codes.index(-9)
    assert list((tmp_path / f"{killed}/out.partial").glob("*.safetensors"))
    assert on_ranks(2, job) == [0, 0]
    assert contents(tmp_path / "0/out") == contents(whole)
    assert [path.name for path in (tmp_path / "1").iterdir()] == ["measured"]


def compress(source: Path, output: Path, **how: Any) -> pocketllm.Report:
    return pocketllm.compress(source, tiny.on_trellis(), output, **how)


@pytest.fixture(scope="module")
def whole(source: Path) -> Path:
    """The output of one process; its plan names every unit."""
    pocketllm.compress(
        source, tiny.on_trellis(), source.parent / "whole", calibration_folder=source.parent / "m"
    )
    return source.parent / "whole"


class Launched:
    """`pocketllm compress` in some forks, as torchrun starts it; what they have printed."""

    def __init__(self, source: Path, folder: Path) -> None:
        self.source, self.output, self.folder = source, folder / "out", folder
        self.arguments = [
            *TRELLIS,
            "--calibration-cache",
            str(folder / "measured"),
            "--threads",
            "1",
            "--quiet",
        ]

    def __call__(self, size: int, before: Callable[[int], None] = lambda rank: None, *more: str) -> list[int]:
        def job(rank: int) -> None:
            for number, name in ((1, "out"), (2, "err")):
                os.dup2(
                    os.open(self.folder / f"{name}-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number
                )
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            before(rank)
            sys.argv = [
                "pocketllm",
                "compress",
                str(self.source),
                "-o",
                str(self.output),
                *self.arguments,
                *more,
            ]
            cli.main()

        return on_ranks(size, job)

    def printed(self, name: str) -> str:
        return "".join(path.read_text() for path in sorted(self.folder.glob(f"{name}-*")))


TRELLIS = ["--bpw", "6", "--set", "codec.trellis_width=6", "--set", "codec.kmeans_iterations=3"]
TRELLIS += ["--set", "codec.depth=1", "--set", "codec.hidden=8", "--set", "decoder_scope=matrix"]
TRELLIS += ["--set", "calibration.tokens=512", "--set", "calibration.context=32"]
TRELLIS += ["--set", "calibration.sensitivity_tokens=128"]


def at_save(number: int, act: Callable[[], object]) -> None:
    """Do something instead of writing a unit."""
    original, count = Workspace.save, iter(range(1000))

    def save(self: Workspace, *arguments: Any) -> None:
        if next(count) == number:
            act()
        original(self, *arguments)

    Workspace.save = save  # type: ignore[method-assign]  # in a fork


@pytest.mark.parametrize("victim", [0, *(pytest.param(rank, marks=pytest.mark.large) for rank in (1, 2))])
def test_a_killed_rank_ends_all_with_one_message_and_another_number_resumes(
    victim: int, source: Path, whole: Path, tmp_path: Path
) -> None:
    launched = Launched(source, tmp_path)
    codes = launched(3, lambda rank: at_save(3, kill_now) if rank == victim else None)
    assert codes == [-9 if rank == victim else 1 for rank in range(3)]
    lost = "ended without a message (killed, or out of memory?); rerun the command to resume"
    assert launched.printed("err") == f"error: rank {victim} of 3 {lost}\n"
    assert launched.printed("out") == "" and not launched.output.exists()
    assert list((tmp_path / "out.partial").glob("*.safetensors"))
    assert launched(2) == [0, 0]
    assert contents(launched.output) == contents(whole)


def test_an_error_on_one_rank_is_shown_once(source: Path, tmp_path: Path) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "a/unit")

    launched = Launched(source, tmp_path)
    assert launched(2, lambda rank: at_save(1, full) if rank == 1 else None, "--json") == [1, 1]
    error = json.loads(launched.printed("out"))["error"]
    assert error["type"] == "RankError" and re.match(
        r"rank 1 of 2: a/unit: the disk is full", error["message"]
    )
    assert launched.printed("err") == f"error: {error['message']}\n"


@pytest.mark.parametrize(("words", "code"), [(["--calibration", "no-such-text"], 1), (["--ratio", "2"], 2)])
def test_an_error_on_all_ranks_is_shown_once(
    words: list[str], code: int, source: Path, tmp_path: Path
) -> None:
    launched = Launched(source, tmp_path)
    codes = launched(2, lambda rank: None, *words)
    assert codes[0] == code and codes[1] in (1, code)
    assert launched.printed("err").count("error: ") == 1 and "rank" not in launched.printed("err")


def test_without_a_command_line_the_other_ranks_raise(source: Path, tmp_path: Path) -> None:
    def job(rank: int) -> None:
        on_failure(None)  # of a command that an earlier test has run in this process
        if rank == 1:
            at_save(2, kill_now)
        with pytest.raises(RankError, match="rank 1 of 2 ended without a message"):
            compress(source, tmp_path / "out", calibration_folder=tmp_path / "measured")

    assert on_ranks(2, job) == [0, -9]


@pytest.mark.large
def test_a_stopped_rank_ends_all(source: Path, tmp_path: Path) -> None:
    """It hangs without having ended, which no closed connection shows."""
    stopped, said = tmp_path / "stopped", tmp_path / "said"

    def stop() -> None:
        stopped.write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)

    def report(message: str) -> None:
        said.write_text(message)
        os.kill(int(stopped.read_text()), signal.SIGKILL)

    def job(rank: int) -> None:
        os.environ["POCKETLLM_RANK_TIMEOUT"] = "5"
        on_failure(report)
        if rank == 1:
            at_save(2, stop)
        compress(source, tmp_path / "out", calibration_folder=tmp_path / "measured")

    assert on_ranks(3, job) == [1, -9, 1]
    assert said.read_text().startswith("rank 1 of 3 gave no sign of life for 5 seconds (stopped,")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compress", "--recover", "distill"], "--recover: runs in one process"),
        (["eval"], "eval: runs in one process, got 2 (WORLD_SIZE)"),
    ],
)
def test_what_runs_in_one_process(
    arguments: list[str], message: str, run: Run, source: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    """It is refused, once."""
    launcher = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    command, *options = arguments
    code, _, err = run(command, source, "-o", tmp_path / "out", *options)
    assert code == 2 and message in err
    monkeypatch.setenv("RANK", "1")
    assert run(command, source, "-o", tmp_path / "out", *options) == (2, "", "")


KILLED_ONCE = """
import os, signal
from pocketllm.format.workspace import Workspace
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and os.environ["RANK"] == "1":
    original = Workspace.save
    def save(self, *arguments):
        original(self, *arguments)
        os.kill(os.getpid(), signal.SIGKILL)
    Workspace.save = save
from pocketllm.cli import main
main()
"""


@pytest.mark.large
@pytest.mark.parametrize("is_killed", [False, True])
def test_torchrun(is_killed: bool, source: Path, whole: Path, tmp_path: Path) -> None:
    """With and without a killed process, after which torchrun starts all of them again."""
    launched = Launched(source, tmp_path)
    (tmp_path / "killed_once.py").write_text(KILLED_ONCE)
    program = ["--max-restarts", "1", str(tmp_path / "killed_once.py")] if is_killed else ["-m", "pocketllm"]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        *program,
    ]
    command += ["compress", str(source), "-o", str(launched.output), *launched.arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["bytes_on_disk"] == sum(
        map(len, contents(whole).values())
    )
    assert contents(launched.output) == contents(whole)
    lost = "error: rank 1 of 2 ended without a message"
    assert (lost in done.stderr) == is_killed
