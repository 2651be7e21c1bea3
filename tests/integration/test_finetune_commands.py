"""Recovery in one go with compression, on the command line, and in several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pocketllm
from pocketllm.format import workspace
from pocketllm.format.checkpoint import folder_bytes, read_report
from pocketllm.recover.compress_then_distill import compress_and_distill
from pocketllm.recover.loop import CHECKPOINT
from tests import tiny
from tests.commands import Run, digest, kill_now, killed
from tests.recovery import config, make


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("recover"))


def test_compress_and_distill_in_one_go(made: Path, tmp_path: Path) -> None:
    settings = tiny.calibrated(tiny.settings())
    report, done = compress_and_distill(made / "m", settings, config(made), tmp_path / "o")
    assert report.bytes_on_disk == folder_bytes(tmp_path / "o")
    assert done.kl_stored < done.kl_before
    assert not (tmp_path / "o.plain").exists()
    apart = pocketllm.distill(made / "c", tmp_path / "apart", config(made), teacher=str(made / "m"))
    assert apart.kl_stored == done.kl_stored


def test_the_models_of_a_chain_are_shown_when_they_are_made(made: Path, tmp_path: Path) -> None:
    shown: list[tuple[str, bool]] = []

    def look(stage: str, folder: Path) -> None:
        shown.append((stage, "recover" in read_report(folder)))

    compress_and_distill(made / "m", tiny.settings(), config(made, steps=1), tmp_path / "o", made=look)
    assert shown == [("compressed", False), ("recovered", True)]


def finetune(made: Path, output: Path, *more: str) -> list[str]:
    text = ("--text", str(made / "t.txt"), "--context", "24", "--steps", "12")
    loop = ("--set", "loop.batch_size=2", "--set", "loop.checkpoint_every=1")
    return ["finetune", str(made / "c"), "-o", str(output), *text, *loop, *more]


def test_a_killed_command_resumes_to_the_same_bytes(made: Path, tmp_path: Path, run: Run) -> None:
    run.json(*finetune(made, tmp_path / "direct"))

    def finetune_until_the_third_checkpoint() -> None:
        saved = 0
        original = workspace.Workspace.save

        def save(*arguments: Any) -> None:
            nonlocal saved
            original(*arguments)
            saved += arguments[1] == CHECKPOINT
            if saved == 3:
                kill_now()

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(workspace.Workspace, "save", save)
            code, _, err = run(*finetune(made, tmp_path / "o"))
            raise AssertionError(f"it was not killed: {code}, {err}")

    killed(finetune_until_the_third_checkpoint)
    assert (tmp_path / "o.partial" / CHECKPOINT).exists()
    assert not (tmp_path / "o").exists()
    code, out, err = run(*finetune(made, tmp_path / "o"), "--json")
    assert code == 0, err
    assert digest(tmp_path / "o") == digest(tmp_path / "direct")
    values = json.loads(out)
    assert values["kl_stored"] < values["kl_before"]
    assert "step 12 of 12" in err


METHODS = ("distill", "lora")
IN_TURN = """
import sys
from pocketllm.cli import main
for method in sys.argv.pop(1).split():
    arguments = [word.replace("METHOD", method) for word in sys.argv]
    sys.argv, kept = arguments, sys.argv
    try:
        main()
    except SystemExit as stop:
        if stop.code:
            raise
    sys.argv = kept
"""


def trained_by_two(made: Path, output: Path) -> list[str]:
    text = ("--text", str(made / "t.txt"), "--context", "24", "--steps", "4", "--set", "loop.batch_size=4")
    more = ("--set", "loop.dtype=float32", "--method", "METHOD", "--json", "-o", str(output / "METHOD"))
    return ["finetune", str(made / "c"), *text, *more]


@pytest.fixture(scope="module")
def two(made: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Each method in two processes, as `accelerate launch` starts them on GPUs; here on the CPU, with one thread.

    Returns where the results are, and what the command said of each. One start of the processes does for both.
    """
    output = tmp_path_factory.mktemp("two")
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launch += ["--main_process_port", "0", "--no_python"]
    command = [sys.executable, "-c", IN_TURN, " ".join(METHODS), *trained_by_two(made, output)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    both = subprocess.run([*launch, *command], capture_output=True, text=True, check=False, env=environment)
    assert both.returncode == 0, both.stderr
    said = map(json.loads, both.stdout.splitlines())
    return output, dict(zip(METHODS, said, strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_do_what_one_does(
    method: str, two: tuple[Path, dict[str, Any]], made: Path, tmp_path: Path, run: Run
) -> None:
    output, said = two
    _, out, _ = run(*(word.replace("METHOD", method) for word in trained_by_two(made, tmp_path)))
    found, wanted = said[method], json.loads(out)
    state = json.loads((output / f"{method}.log" / "summary.json").read_text())
    assert state["arguments"]["processes"] == 2
    key = "kl_stored" if method == "distill" else "loss_stored"
    assert found[key] == pytest.approx(wanted[key], rel=1e-4)
    assert found[key] < found[key.replace("stored", "before")]
    lines = (output / f"{method}.log" / "steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4]


def test_command_line_says_what_is_wrong(made: Path, tmp_path: Path, run: Run) -> None:
    values = run.json(*finetune(made, tmp_path / "o", "--dry-run"))
    assert (values["steps"], values["tokens"], values["bytes_added_to_weights"]) == (12, 12 * 2 * 24, 0)
    report = read_report(made / "c")
    assert values["trained_parameters"]["row scales"] * 2 == report["bytes_by_part"]["row_scales"]
    code, _, err = run(*finetune(made, tmp_path / "o", "--set", "rank=4"))
    assert code == 2 and "rank does not apply to --method distill" in err
    for option in ("--teacher=x", "--teacher-on-disk", "--teacher-cache=x"):
        code, _, err = run("finetune", made / "c", "-o", tmp_path / "o", "--method", "lora", option)
        assert code == 2 and f"{option.partition('=')[0]} does not apply to --method lora" in err
    code, _, err = run(*finetune(made, tmp_path / "o", "--validation-text", ""))
    assert code == 1 and "got an empty name" in err
    assert run("finetune", made / "m", "-o", tmp_path / "o")[0] == 1
    assert not (tmp_path / "o.partial").exists()
