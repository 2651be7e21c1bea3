"""`pocketllm eval`: a model alone, beside the dense one, with an adapter; and what is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

import pocketllm
from pocketllm.config import LoopConfig, LoraTuneConfig
from pocketllm.format.checkpoint import folder_bytes, read_layout
from tests import tiny
from tests.commands import Run


def test_eval(run: Run, small: Path, source: Path, text: Path) -> None:
    options = ["--ppl", text, "--context", "32", "--windows", "3"]
    found = run.json("eval", small, *options)
    assert set(found) >= {"perplexity", "context", "windows", "tokens", "bytes_on_disk", "compressed"}
    assert (found["context"], found["windows"], found["tokens"]) == (32, 3, 93)
    assert found["compressed"] and found["perplexity"] > 1
    packed = run.json("eval", small, *options, "--mode", "packed")["perplexity"]
    assert packed == pytest.approx(found["perplexity"], rel=1e-6)
    dense = run.json("eval", source, *options)
    assert not dense["compressed"] and dense["perplexity"] != found["perplexity"]
    code, out, _ = run("eval", small, *options)
    assert code == 0 and f"{text}: context 32, 3 windows, 93 tokens\n" in out


def test_several_texts_and_their_mean(
    run: Run, small: Path, source: Path, text: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.txt"
    other.write_text(" ".join(reversed(text.read_text().split())))
    options = ["--context", "32", "--windows", "3", "--against", source]
    both = run.json("eval", small, "--ppl", text, "--ppl", other, *options)
    single = [run.json("eval", small, "--ppl", name, *options) for name in (text, other)]
    assert [found["text"] for found in both["texts"]] == [str(text), str(other)] and both["text"] is None
    for found, alone in zip(both["texts"], single, strict=True):
        assert found == alone["texts"][0] and found["kl"] == alone["kl"]
        assert found["reference_perplexity"] == alone["against"]["perplexity"]
    assert both["kl"] == pytest.approx((single[0]["kl"] + single[1]["kl"]) / 2)
    assert both["perplexity"] == pytest.approx((single[0]["perplexity"] * single[1]["perplexity"]) ** 0.5)
    assert both["kl_stderr"] == pytest.approx(math.hypot(*(each["kl_stderr"] for each in single)) / 2)
    assert both["windows"] == 6
    _, out, _ = run("eval", small, "--ppl", text, "--ppl", other, *options)
    assert f"{other}: context 32" in out and "mean over 2 texts" in out


def test_rows_are_read_as_rows(run: Run, small: Path, source: Path, text: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"id": "x" * 500, "text": text.read_text()}))
    windows = ["--context", "32", "--windows", "3"]
    found, wanted = (run.json("eval", small, "--ppl", file, *windows) for file in (rows, text))
    assert found["perplexity"] == wanted["perplexity"]
    rows.write_text('{"url": "https://example.org"}')
    for command in (("eval", small), ("compress", source, "-o", tmp_path / "out", "--dry-run")):
        code, _, err = run(*command, "--ppl", rows)
        assert code == 1 and "row 1" in err and "known to hold text" in err


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
    assert code == 0 and "matrices verified" in out and "KL(other || this)" in out and "cached" in out
    assert "paper's average (1 of 5)" in out and "not measured: winogrande" in out and "first 6" in out
    assert "chance is 0 in the averages where answers are not chosen from a list: lambada_openai" in out
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
        (["SMALL", "--set", "contxt=3"], 2, "--set: unknown key 'contxt'; closest: context"),
        (["SMALL", "--tasks", "piqa", "--limit", "-1"], 2, "--limit"),
        (["SMALL", "--tasks", "piqa", "--set", "batch_tokens=0"], 2, "batch_tokens: got 0"),
        (["SMALL", "--tasks", "piqa", "--data", "nowhere"], 1, "nowhere is not a folder"),
        (["SMALL", "--tasks", "arc_easy", "--data", "DATA"], 1, "contains no arc_easy/test.jsonl"),
        (["SMALL", "--ppl", "TEXT", "--context", "32", "--against", "OTHER"], 2, "'z' is missing and"),
        (["SMALL", "--tasks", "piqa", "--data", "DATA", "--against", "OTHER"], 2, "but different ones"),
        (["SMALL", "--tasks", "piqa", "--data", "DATA", "--against", "LARGER"], 2, "larger has a vocab"),
        (["SMALL", "--ppl", "TEXT", "--context", "32", "--against", "EMPTY"], 1, "no config.json"),
        (["DAMAGED", "--tasks", "piqa", "--data", "DATA"], 1, "damaged: its logits are not finite"),
        (["SMALL", "--ppl", "TEXT", "--context", "32", "--against", "DAMAGED"], 1, "damaged: its logits"),
        (["SMALL", "--ppl", "TEXT", "--against", "./nowhere"], 1, "no such folder"),
        (["/", "--ppl", "TEXT"], 1, "/: no config.json; wanted a Hugging Face model folder"),
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
    places["LARGER"] = tiny.save(tmp_path / "larger", vocab_size=128)
    places["DAMAGED"] = tiny.save(tmp_path / "damaged")
    places["EMPTY"] = tmp_path / "empty"
    places["EMPTY"].mkdir()
    model = tiny.model()
    model.model.norm.weight.data[0] = float("nan")
    model.save_pretrained(places["DAMAGED"])
    found, out, err = run("eval", *(places.get(argument, argument) for argument in arguments))
    assert found == code, err
    assert words in err and not out and "Traceback" not in err


def test_a_folder_that_the_environment_names_is_there(
    run: Run, small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POCKETLLM_DATA", "/nowhere")
    code, _, err = run("eval", small, "--tasks", "local")
    assert code == 1 and "POCKETLLM_DATA: /nowhere is not a folder" in err


@pytest.mark.parametrize(
    ("name", "code", "words"), [("nosuch", 2, "unknown task"), ("arc_easy", 1, "contains no arc_easy")]
)
def test_tasks_are_found_before_the_text_is_measured(
    name: str, code: int, words: str, run: Run, small: Path, text: Path, data: Path
) -> None:
    found, _, err = run("eval", small, "--ppl", text, "--context", "32", "--tasks", name, "--data", data)
    assert found == code and words in err and "%" not in err  # no progress


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
