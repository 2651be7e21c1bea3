"""The command line where it fails: exit codes, messages, JSON, Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands import SETTINGS, Run


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["compress", "SOURCE", "-o", "OUT", "--preset", "paper-9x"], 2, "unknown preset"),
        (["compress", "SOURCE", "-o", "OUT", "--preset", "paper-8x", "--bpw", "3"], 2, "cannot be combined"),
        (["compress", "SOURCE", "-o", "OUT", "--bpw", "0"], 2, "error: --bpw: got 0"),
        (["compress", "SOURCE", "-o", "OUT", "--bpw", "0.01"], 2, "error: --bpw: 0.01 cannot be met"),
        (
            ["compress", "SOURCE", "-o", "OUT", "--size", "1000", "--no-calibration"],
            2,
            "error: --size: 1,000 cannot be met",
        ),
        (["compress", "SOURCE", "-o", "OUT", "--ratio", "90", "--no-calibration"], 2, "error: --ratio: 90 ("),
        (["compress", "SOURCE", "-o", "OUT", "--device", "tpu"], 2, "--device"),
        (["compress", "SOURCE", "-o", "OUT", "--set", "codebook_size=8"], 2, "without vector_len"),
        (["compress", "./nowhere", "-o", "OUT"], 1, "no such folder"),
        (["compress", "SOURCE"], 2, "Missing option"),
        (["eval", "SMALL", "--ppl", "TEXT", "--context", "1"], 2, "context"),
        (["eval", "SMALL", "--ppl", "TEXT", "--windows", "-1"], 2, "--windows"),
        (["eval", "SMALL", "--ppl", "TEXT", "--windows", "9999", "--context", "32"], 2, "tokens"),
        (["eval", "SMALL", "--ppl", "nowhere.txt"], 1, "nowhere.txt"),
        (["eval", "SMALL", "--ppl", "TEXT", "--mode", "fast"], 2, "mode"),
        (["eval", "SMALL", "--ppl", "TEXT", "--dtype", "int4"], 2, "--dtype"),
        (["generate", "SMALL", "--prompt", " "], 2, "prompt"),
        (["generate", "SMALL", "--prompt", "x", "--max-new-tokens", "0"], 2, "max_new_tokens"),
        (["generate", "SMALL", "--prompt", "x", "--chat"], 2, "chat"),
        (["generate", "SMALL", "--prompt", "x", "--system", "y"], 2, "--system: is a message of a chat"),
        (["generate", "SMALL", "--prompt", "x", "--top-p", "0"], 2, "top_p: got 0.0"),
        (["info", "SOURCE"], 1, "not a model compressed by pocketllm"),
        (["info", "nowhere"], 1, "nowhere"),
        (["export", "SOURCE", "--to", "OUT"], 1, "not a model compressed"),
        (["frobnicate"], 2, "frobnicate"),
    ],
)
def test_errors(
    arguments: list[str],
    code: int,
    words: str,
    run: Run,
    source: Path,
    small: Path,
    text: Path,
    tmp_path: Path,
) -> None:
    places = {"SOURCE": source, "SMALL": small, "TEXT": text, "OUT": tmp_path / "out"}
    found, out, err = run(*(places.get(argument, argument) for argument in arguments))
    assert found == code, err
    assert words in err and not out
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_errors_as_json(run: Run, tmp_path: Path) -> None:
    code, out, err = run("compress", "./nowhere", "-o", tmp_path / "out", "--json")
    assert code == 1
    assert json.loads(out)["error"]["type"] == "SourceError"
    assert "nowhere" in err


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (["compress"], "MissingParameter", "Missing argument"),
        (["compress", "m", "-o", "OUT", "--fast"], "NoSuchOption", "--fast"),
        (["compress", "m", "-o", "OUT", "--seed", "x"], "BadParameter", "--seed"),
        (["compress", "m", "-o", "OUT", "--threads", "1000000"], "BadParameter", "--threads"),
        (["compress", "m", "-o", "OUT", "--bpw", "0"], "ConfigError", "--bpw: got 0"),
        (["compress", "m", "-o", "OUT", "--hidden", "8"], "ConfigError", "use --set codec.hidden=8"),
        (["compress", "m", "-o", "OUT", "--set", "codec.hiden=8"], "ConfigError", "closest: codec.hidden"),
        (["frobnicate"], "UsageError", "frobnicate"),
    ],
)
def test_wrong_use_as_json(arguments: list[str], kind: str, words: str, run: Run) -> None:
    code, out, err = run(*arguments, "--json")
    error = json.loads(out)["error"]
    assert code == 2 and out.count("\n") == 1 and set(error) == {"type", "message"}
    assert error["type"] == kind and words in error["message"] and words in err


def test_ctrl_c(run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pocketllm.compression import fit_codebooks

    def interrupted(*arguments: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(fit_codebooks, "fit", interrupted)
    code, out, err = run("compress", source, "-o", tmp_path / "out", *SETTINGS)
    assert code == 130 and "interrupted; rerun the command" in err and not out and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_ctrl_c_where_no_bar_is_shown(run: Run, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pocketllm.cli import option_groups

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(option_groups, "load_any", interrupted)
    code, out, err = run("generate", small, "--prompt", "hello")
    assert code == 130 and "interrupted" in err and not out and "Traceback" not in err
    code, out, _ = run("generate", small, "--prompt", "hello", "--json")
    assert code == 130 and json.loads(out)["error"]["type"] == "KeyboardInterrupt"


def test_ctrl_c_while_starting(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from pocketllm.cli import app

    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(app, "run", interrupted)
    code, out, err = run("info", "small", "--json")
    assert code == 130 and "interrupted" in json.loads(out)["error"]["message"] and "interrupted" in err


def test_a_real_ctrl_c(source: Path, tmp_path: Path) -> None:
    """SIGINT to a process that trains."""
    command = [sys.executable, "-m", "pocketllm", "compress", str(source), "-o", str(tmp_path / "out")]
    command += ["--set", "vector_len=5", "--set", "codebook_size=32"]
    command += ["--set", "codec.batch_size=2", "--set", "codec.epochs=1000"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a job in the background ignores it
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("fit:"):
                break
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
    assert process.returncode == 130 and "interrupted" in err and "Traceback" not in err and not out
    assert [path.name for path in tmp_path.iterdir()] == ["out.partial"]


def test_no_gpu_is_said(run: Run, source: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    code, _, err = run("compress", source, "-o", tmp_path / "out", "--device", "cuda")
    assert code == 2 and "no GPU" in err
