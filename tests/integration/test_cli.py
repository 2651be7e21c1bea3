"""The command line: what goes to stdout and stderr, the keys that others rely on, the help."""

from __future__ import annotations

import io
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
