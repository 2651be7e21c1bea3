"""The command line: exit codes, what goes to stdout and stderr, the keys that others rely on."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pocketllm
from pocketllm.evaluate import Generation
from tests.commands import SETTINGS, SIZES, Run


def test_compress_and_info(run: Run, source: Path, tmp_path: Path) -> None:
    report = run.json("compress", source, "-o", tmp_path / "out", *SETTINGS)
    assert set(report) >= SIZES
    assert set(report["matrices"][0]) >= {"name", "shape", "bpw", "nmse", "codebook_utilization"}
    assert all(entry["reason"] for entry in report["skipped"])
    assert report["bytes_on_disk"] == sum(p.stat().st_size for p in (tmp_path / "out").iterdir())
    assert sum(report["bytes_by_part"].values()) == report["bytes_on_disk"]
    info = run.json("info", tmp_path / "out")
    assert all(info[key] == report[key] for key in SIZES)


def test_tables_are_printed_on_stdout_and_progress_on_stderr(run: Run, source: Path, tmp_path: Path) -> None:
    code, out, err = run("compress", source, "-o", tmp_path / "out", *SETTINGS)
    assert code == 0
    assert "bytes on disk" in out and "nmse" in out and "indices" in out
    assert "encode" in err and "fit" in err and "encode" not in out
    code, out, err = run("compress", source, "-o", tmp_path / "out", *SETTINGS, "--overwrite", "--quiet")
    assert code == 0 and not err


def test_dry_run_writes_nothing_and_is_exact(run: Run, source: Path, tmp_path: Path) -> None:
    planned = run.json("compress", source, "-o", tmp_path / "out", *SETTINGS, "--dry-run")
    assert not list(tmp_path.iterdir())
    assert planned["is_plan"] and planned["matrices"][0]["codebook_utilization"] is None
    report = run.json("compress", source, "-o", tmp_path / "out", *SETTINGS)
    assert planned["bytes_on_disk"] == report["bytes_on_disk"]
    code, out, _ = run("compress", source, "-o", tmp_path / "x", *SETTINGS, "--dry-run")
    assert code == 0 and "nothing was fitted" in " ".join(out.split()) and "predicted" in out


def test_info_shows_and_verifies(run: Run, small: Path, tmp_path: Path) -> None:
    code, out, _ = run("info", small)
    assert code == 0 and "checksums OK" in out
    import shutil

    shutil.copytree(small, tmp_path / "copy")
    path = tmp_path / "copy" / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    code, out, err = run("info", tmp_path / "copy")
    assert code == 1 and "tokenizer.json" in err and not out
    assert run("info", tmp_path / "copy", "--no-check")[0] == 0


def test_generate(run: Run, small: Path) -> None:
    found = run.json("generate", small, "--prompt", "hello", "--max-new-tokens", "5")
    assert found["text"].startswith("hello") and found["tokens_per_second"] > 0
    again = run.json("generate", small, "--prompt", "hello", "--max-new-tokens", "5", "--mode", "packed")
    assert again["text"] == found["text"]
    shown = run("generate", small, "--prompt", "hello", "--max-new-tokens", "5")[1]
    assert shown.strip() == found["text"].strip() == ("hello" + found["continuation"]).strip()
    several = run.json("generate", small, "--prompt", "hello", "--prompt", "a b", "--max-new-tokens", "5")
    assert several["generations"][0]["text"] == found["text"] and len(several["generations"]) == 2
    shown = run("generate", small, "--prompt", "hello", "--prompt", "a b", "--max-new-tokens", "5")[1]
    assert all(each["text"].strip() in shown for each in several["generations"])


def test_generate_reads_stdin(run: Run, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello"))
    given = run.json("generate", small, "--max-new-tokens", "5")
    assert given["text"] == run.json("generate", small, "--prompt", "hello", "--max-new-tokens", "5")["text"]


def test_a_conversation(run: Run, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each line is answered with what was said before in view."""
    seen: list[Any] = []

    def answer(model: Any, tokenizer: Any, prompt: Any, *settings: Any, **more: Any) -> Any:
        seen.append([(turn["role"], turn["content"]) for turn in prompt])
        more["on_text"]("well")
        return Generation("", "well", 1, 2.0)

    monkeypatch.setattr(pocketllm, "generate", answer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("hello\nand you?\n"))
    code, out, _ = run("generate", small, "--chat", "--system", "be brief")
    opening = [("system", "be brief"), ("user", "hello")]
    assert (code, out) == (0, "well\nwell\n")
    assert seen == [opening, [*opening, ("assistant", "well"), ("user", "and you?")]]
    code, _, err = run("generate", small, "--chat", "--json")
    assert code == 2 and "--json: a conversation has no single result" in err


def test_export_is_an_ordinary_model(run: Run, small: Path, tmp_path: Path) -> None:
    found = run.json("export", small, "--to", tmp_path / "dense", "--dtype", "float32")
    assert found["bytes_on_disk"] == sum(p.stat().st_size for p in (tmp_path / "dense").iterdir())
    assert len({p.stat().st_mode for p in (tmp_path / "dense").iterdir()}) == 1
    code = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'dense')!r})\n"
        "assert not hasattr(model, 'hf_quantizer')\n"
        "print(model(torch.arange(20)[None]).logits.double().sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    model, _ = pocketllm.load(small, mode="dense", dtype=torch.float32)
    expected = model(torch.arange(20)[None]).logits.double().sum().item()
    assert float(done.stdout) == pytest.approx(expected, rel=1e-6)
    code_, _, err = run("export", small, "--to", tmp_path / "dense")
    assert code_ == 1 and "choose another output folder" in err


@pytest.mark.parametrize("name", ["thesis.tex", "state.json"])
def test_export_deletes_nothing_beside_its_output(name: str, run: Run, small: Path, tmp_path: Path) -> None:
    """Neither what is foreign nor the half-done work of `compress -o dense`; nor does an export that fails.

    It works in `dense.partial` as every command does, so that it is refused as long as that is somebody else's.
    """
    partial = tmp_path / "dense.partial"
    partial.mkdir()
    (partial / name).write_text("hours of work")
    code, _, err = run("export", small, "--to", tmp_path / "dense")
    assert code == 1 and str(partial) in err
    assert (partial / name).read_text() == "hours of work"
    assert [path.name for path in tmp_path.iterdir()] == ["dense.partial"]
    partial.rename(tmp_path / "elsewhere")
    assert run("export", small, "--to", tmp_path / "dense")[0] == 0
    assert (tmp_path / "dense" / "model.safetensors").is_file()
    assert run("export", small, "--to", tmp_path / "dense")[0] == 1
    assert {path.name for path in tmp_path.iterdir()} == {"dense", "elsewhere"}
    assert (tmp_path / "dense").stat().st_mode == (tmp_path / "elsewhere").stat().st_mode


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
    from pocketllm.cli import generate_command

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_command, "load_any", interrupted)
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


@pytest.mark.parametrize(
    "command",
    [
        *(
            "compress",
            "settings",
            "info",
            "eval",
            "generate",
            "export",
            "demo",
            "finetune",
            "merge",
            "report",
        ),
        *("compare", "study", "doctor"),
    ],
)
def test_help_has_an_example(command: str, run: Run) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0 and f"pocketllm {command}" in out and "Example" in out


def test_version(run: Run) -> None:
    code, out, _ = run("--version")
    assert code == 0 and out.strip() == f"pocketllm-codec {pocketllm.__version__}"


def test_help_in_a_process_of_its_own() -> None:
    command = [sys.executable, "-m", "pocketllm", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "compress" in done.stdout and "export" in done.stdout


@pytest.mark.parametrize(
    "command", [[], ["study"], ["compress"], ["finetune"], ["eval"], ["settings"], ["doctor"]]
)
def test_help_is_light(command: list[str]) -> None:
    code = (
        "import atexit, sys\nfrom pocketllm.cli import main\n"
        f"sys.argv = ['pocketllm', *{command}, '--help']\n"
        "atexit.register(lambda: print(sorted({'torch', 'transformers', 'matplotlib'} & set(sys.modules))))\nmain()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]")
