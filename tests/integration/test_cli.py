"""The command line: exit codes, what goes to stdout and stderr, the keys that others rely on."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import pocketllm
from pocketllm import cli
from pocketllm.config import DistillConfig, LoopConfig, LoraTuneConfig
from pocketllm.model.checkpoint import folder_bytes, read_layout
from tests import tiny

SETTINGS = ["--vector-len", "5", "--codebook-size", "32", "--codebook-scope", "kind"]
SETTINGS += ["--epochs", "1", "--threads", "2"]
SIZES = {
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


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(capsys, monkeypatch)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("cli") / "dense")


@pytest.fixture(scope="module")
def small(source: Path) -> Path:
    pocketllm.compress(source, tiny.settings(), source.parent / "small")
    return source.parent / "small"


@pytest.fixture(scope="module")
def text(source: Path) -> Path:
    path = source.parent / "text.txt"
    path.write_text("a text that is long enough for some windows. " * 20, encoding="utf-8")
    return path


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
    assert code == 0 and "nothing was fitted" in out and "predicted" in out


def test_info_shows_and_verifies(run: Run, small: Path, tmp_path: Path) -> None:
    code, out, _ = run("info", small)
    assert code == 0 and "all checksums good" in out
    import shutil

    shutil.copytree(small, tmp_path / "copy")
    path = tmp_path / "copy" / "tokenizer.json"
    path.write_text(path.read_text() + " ")
    code, out, err = run("info", tmp_path / "copy")
    assert code == 1 and "tokenizer.json" in err and not out
    assert run("info", tmp_path / "copy", "--no-check")[0] == 0


def test_eval(run: Run, small: Path, source: Path, text: Path) -> None:
    options = ["--ppl", text, "--context", "32", "--windows", "3"]
    found = run.json("eval", small, *options)
    assert set(found) >= {"perplexity", "context", "windows", "tokens", "bytes_on_disk", "compressed"}
    assert (found["context"], found["windows"], found["tokens"]) == (32, 3, 93)
    assert found["compressed"] and found["perplexity"] > 1
    assert run.json("eval", small, *options, "--mode", "packed")["perplexity"] == found["perplexity"]
    dense = run.json("eval", source, *options)
    assert not dense["compressed"] and dense["perplexity"] != found["perplexity"]
    code, out, _ = run("eval", small, *options)
    assert code == 0 and "context 32" in out and "3 windows" in out


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Local task files; results are kept in a cache of the test's own."""
    monkeypatch.setenv("POCKETLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("POCKETLLM_DATA", raising=False)
    folder = tmp_path / "data"
    (folder / "piqa").mkdir(parents=True)
    rows = [
        {"goal": f"count to {n}", "sol1": "one two", "sol2": "2" * n, "label": n % 2} for n in range(1, 9)
    ]
    (folder / "piqa" / "valid.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "lambada").mkdir()
    (folder / "lambada" / "test.jsonl").write_text('{"text": "one two"}\n{"text": "three four"}\n')
    return folder


def test_eval_beside_the_dense_model(
    run: Run, small: Path, source: Path, text: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ["--ppl", text, "--context", "32", "--windows", "3", "--against", source]
    options += ["--tasks", "piqa, lambada", "--data", data, "--limit", "6"]
    found = run.json("eval", small, *options)
    assert set(found) >= {
        "kl",
        "kl_stderr",
        "top1_agreement",
        "top1_agreement_stderr",
        "average",
        "difference",
    }
    assert found["compressed"] and found["matrices"] == len(read_layout(small).matrices)
    assert found["kl"] > 0 and 0 <= found["top1_agreement"] <= 1 and found["limit"] == 6
    against = found["against"]
    assert not against["compressed"] and against["bytes_on_disk"] > found["bytes_on_disk"]
    assert against["perplexity"] == pytest.approx(run.json("eval", source, *options[:6])["perplexity"])
    piqa = found["tasks"]["piqa"]
    assert set(piqa) >= {
        "acc",
        "acc_stderr",
        "acc_norm",
        "acc_norm_stderr",
        "n",
        "versions",
        "limit",
        "seconds",
    }
    assert (piqa["n"], found["tasks"]["lambada_openai"]["n"]) == (6, 2)
    gap = found["difference"]["tasks"]["piqa"]["acc"]["difference"]
    assert gap == pytest.approx(piqa["acc"] - against["tasks"]["piqa"]["acc"])
    code, out, err = run("eval", small, *options)
    assert code == 0 and "matrices verified" in out and "KL(other || this)" in out and "kept" in out
    assert "paper's average (1 of 5)" in out and "not measured: winogrande" in out and "first 6" in out
    assert "piqa" in err and "loglikelihood" not in err
    code, out, _ = run("eval", small, "--tasks", "local", "--data", data)
    assert code == 0 and "perplexity" in out and "difference" not in out
    monkeypatch.setenv("POCKETLLM_DATA", str(data))
    assert set(run.json("eval", small, "--tasks", "local", "--no-cache")["tasks"]) == {
        "piqa",
        "lambada_openai",
    }


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["SMALL"], 2, "nothing to measure"),
        (["SMALL", "--tasks", "piqa", "--limit", "-1"], 2, "--limit"),
        (["SMALL", "--tasks", "piqa", "--batch-tokens", "0"], 2, "batch_tokens"),
        (["SMALL", "--tasks", "piqa", "--data", "nowhere"], 1, "nowhere is no folder"),
        (["SMALL", "--tasks", "arc_easy", "--data", "DATA"], 1, "holds no arc_easy/test.jsonl"),
        (["SMALL", "--ppl", "TEXT", "--context", "32", "--against", "OTHER"], 2, "another vocabulary"),
        (["SMALL", "--ppl", "TEXT", "--against", "./nowhere"], 1, "no such folder"),
    ],
)
def test_eval_errors(
    arguments: list[str], code: int, words: str, run: Run, small: Path, text: Path, data: Path, tmp_path: Path
) -> None:
    other = tiny.save(tmp_path / "other")
    vocabulary = json.loads((other / "tokenizer.json").read_text())
    vocabulary["model"]["vocab"].pop("z")
    (other / "tokenizer.json").write_text(json.dumps(vocabulary))
    places = {"SMALL": small, "TEXT": text, "DATA": data, "OTHER": other}
    found, out, err = run("eval", *(places.get(argument, argument) for argument in arguments))
    assert found == code, err
    assert words in err and not out and "Traceback" not in err


def test_generate(run: Run, small: Path) -> None:
    found = run.json("generate", small, "--prompt", "hello", "--max-new-tokens", "5")
    assert found["text"].startswith("hello") and found["tokens_per_second"] > 0
    again = run.json("generate", small, "--prompt", "hello", "--max-new-tokens", "5", "--mode", "packed")
    assert again["text"] == found["text"]


def test_export_is_an_ordinary_model(run: Run, small: Path, tmp_path: Path) -> None:
    found = run.json("export", small, "--to", tmp_path / "dense", "--dtype", "float32")
    assert found["bytes_on_disk"] == sum(p.stat().st_size for p in (tmp_path / "dense").iterdir())
    code = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'dense')!r})\n"
        "assert 'pocketllm' not in sys.modules\n"
        "print(model(torch.arange(20)[None]).logits.double().sum().item())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    model = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32)
    expected = model(torch.arange(20)[None]).logits.double().sum().item()
    assert float(done.stdout) == pytest.approx(expected, rel=1e-6)
    code_, _, err = run("export", small, "--to", tmp_path / "dense")
    assert code_ == 1 and "choose another output folder" in err


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["compress", "SOURCE", "-o", "OUT", "--preset", "paper-9x"], 2, "unknown preset"),
        (["compress", "SOURCE", "-o", "OUT", "--preset", "paper-8x", "--bpw", "3"], 2, "exclude"),
        (["compress", "SOURCE", "-o", "OUT", "--bpw", "0"], 2, "target_bpw"),
        (["compress", "SOURCE", "-o", "OUT", "--bpw", "0.01"], 2, "possible are"),
        (["compress", "SOURCE", "-o", "OUT", "--device", "tpu"], 2, "--device"),
        (["compress", "SOURCE", "-o", "OUT", "--codebook-size", "8"], 2, "without vector_len"),
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


def test_ctrl_c(run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pocketllm.model import compress

    def interrupted(*arguments: Any, **keywords: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(compress, "fit", interrupted)
    code, out, err = run("compress", source, "-o", tmp_path / "out", *SETTINGS)
    assert code == 130 and "interrupted; compress" in err and not out and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_ctrl_c_where_no_bar_is_shown(run: Run, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pocketllm.cli import evaluate

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "load_any", interrupted)
    code, out, err = run("generate", small, "--prompt", "hello")
    assert code == 130 and "interrupted" in err and not out and "Traceback" not in err


def test_a_real_ctrl_c(source: Path, tmp_path: Path) -> None:
    """SIGINT to a process that trains."""
    command = [sys.executable, "-m", "pocketllm", "compress", str(source), "-o", str(tmp_path / "out")]
    command += ["--vector-len", "5", "--codebook-size", "32", "--batch-size", "2", "--epochs", "1000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
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


def test_demo(run: Run, source: Path, tmp_path: Path) -> None:
    options = [
        "demo",
        "--model",
        source,
        "-o",
        tmp_path / "demo",
        "--bpw",
        "7",
        "--no-calibration",
        "--windows",
        "2",
    ]
    options += ["--context", "32", "--prompt", "hello", "--recover-steps", "2"]
    values = run.json(*options)
    assert values["dense"]["perplexity"] > 1 and values["compressed"]["perplexity"] > 1
    assert values["compressed"]["bytes_on_disk"] < values["dense"]["bytes_on_disk"]
    assert values["recovered"]["perplexity"] != values["compressed"]["perplexity"]
    assert values["report"]["recover"]["steps"] == 2
    assert values["text"].startswith("hello")
    code, out, err = run(*options)  # finds what is there
    assert code == 0 and "perplexity" in out and "> hello" in out and "recovered by distill" in out
    assert err.count("is there already") == 2
    code, out, err = run(*options[:-1], "3")  # other steps: only that part is made again
    assert code == 0 and err.count("is there already") == 1 and "step 3 of 3" in err
    assert "recovered" not in run.json(*options[:-1], "0")


def test_demo_takes_the_windows_that_the_text_has(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says before the work begins that it has none."""
    from pocketllm.evaluate import texts

    monkeypatch.setattr(texts, "evaluation_text", lambda: ("a short text", "a short text. " * 10))
    options = ["demo", "--model", source, "-o", tmp_path / "demo", "--bpw", "7", "--no-calibration"]
    options += ["--prompt", "hello"]
    code, _, err = run(*options, "--context", "64", "--windows", "1000")
    assert code == 0, err
    values = run.json(*options, "--context", "64", "--windows", "1000")
    assert values["dense"]["windows"] == values["compressed"]["windows"] == 2
    code, _, err = run(*options[:3], "-o", tmp_path / "none", "--context", "1024")
    assert code == 2 and "lower context" in err and not list(tmp_path.glob("none*"))


def test_the_demo_of_the_readme_has_text_to_measure_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python's own text, in characters: about 4 to a token, and less than 5 windows would say little."""
    from pocketllm.evaluate.texts import evaluation_text

    monkeypatch.delenv("POCKETLLM_DATA", raising=False)
    name, text = evaluation_text()
    assert "Python" in name and len(text) > 5 * 1024 * 4


def test_the_stages_in_one_command(run: Run, source: Path, text: Path, tmp_path: Path) -> None:
    options = ["compress", source, "-o", tmp_path / "out", *SETTINGS, "--ppl", text, "--context", "32"]
    options += ["--windows", "3"]
    recover = ["--recover", "distill", "--recover-text", text, "--recover-steps", "2", "--overwrite"]
    with pytest.MonkeyPatch.context() as patch:
        quick = dataclasses.replace(DistillConfig(), context=32)
        patch.setattr(
            "pocketllm.cli.settings.DistillConfig", lambda **given: dataclasses.replace(quick, **given)
        )
        found = run.json(*options, *recover)
    assert set(found["measured"]) == {"dense", "compressed", "recovered"}
    assert found["recover"]["steps"] == 2
    for title, folder in (("dense", source), ("recovered", tmp_path / "out")):
        wanted = run.json("eval", folder, *options[-6:])["perplexity"]
        assert found["measured"][title]["perplexity"] == pytest.approx(wanted)
    code, out, _ = run(*options, "--overwrite")
    assert code == 0 and "compressed" in out and "recovered" not in out
    code, _, err = run(*options, "--recover-steps", "2", "--overwrite")
    assert code == 2 and "need --recover distill" in err
    code, _, err = run(*options, "--recover", "lora", "--overwrite")
    assert code == 2 and "wanted distill" in err


@pytest.fixture(scope="module")
def adapter(source: Path, small: Path, text: Path) -> Path:
    """An adapter of `small`, trained for a moment."""
    loop = LoopConfig(batch_size=2)
    config = LoraTuneConfig(texts=(str(text),), context=32, rank=2, steps=3, learning_rate=0.1, loop=loop)
    pocketllm.lora(small, source.parent / "adapter", config)
    return source.parent / "adapter"


def test_an_adapter_runs_and_its_bytes_count(
    run: Run, small: Path, source: Path, text: Path, adapter: Path, data: Path
) -> None:
    nbytes, base = folder_bytes(adapter), folder_bytes(small)
    ppl = ["--ppl", text, "--context", "32", "--windows", "3"]
    tasks = ["--tasks", "piqa", "--data", data]
    plain = run.json("eval", small, *ppl, *tasks)
    for mode in ("dense", "packed"):
        found = run.json("eval", small, "--adapter", adapter, "--mode", mode, *ppl, *tasks)
        assert found["matrices"] == plain["matrices"] and not found["tasks"]["piqa"]["cached"]
        assert (found["adapter_bytes"], found["bytes_on_disk"]) == (nbytes, base + nbytes)
        assert abs(found["perplexity"] / plain["perplexity"] - 1) > 1e-3
    code, out, _ = run("eval", small, "--adapter", adapter, *ppl)
    assert code == 0 and "with adapter" in out and f"{base + nbytes:,}" in out
    assert run.json("info", small, "--adapter", adapter)["bytes_on_disk"] == base + nbytes
    code, out, _ = run("info", small, "--adapter", adapter)
    assert code == 0 and f"{base + nbytes:,}" in out and "adapter" in out
    written = run.json("generate", small, "--prompt", "hello", "--adapter", adapter)
    assert written["bytes_on_disk"] == base + nbytes
    both = run.json("compare", small, "--adapter", adapter, *ppl, "--against", source)
    assert [m["bytes_on_disk"] for m in both["models"]] == [base, base + nbytes]
    assert both["models"][0]["perplexity"] == pytest.approx(plain["perplexity"])
    assert both["models"][1]["perplexity"] == pytest.approx(found["perplexity"])
    for arguments in (["eval", source, *ppl], ["info", source], ["generate", source, "--prompt", "x"]):
        code, out, err = run(*arguments, "--adapter", adapter)
        assert code == 1 and "not a model compressed by pocketllm" in err and not out


@pytest.mark.parametrize(
    "command", ["compress", "info", "eval", "generate", "export", "demo", "finetune", "merge", "compare"]
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
