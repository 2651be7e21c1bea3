"""`pocketllm demo`, and all stages in one command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pocketllm import evaluate
from pocketllm.evaluate import BenchRun
from tests import tiny
from tests.commands import SETTINGS, Run


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[list[str | Path]]:
    """What the speed of was to be measured; the demo of the README measures, which takes two processes."""
    asked: list[list[str | Path]] = []

    def bench(
        models: list[str], modes: list[str], config: Any, against: str, progress: Any
    ) -> list[BenchRun]:
        asked.append([*models, against])
        made = zip([*models, against], (*modes, "checkpoint"), strict=True)
        return [
            BenchRun(model, mode, "bfloat16", 1.0, 2.0, 3.0, 4_000_000, 5_000_000, 1) for model, mode in made
        ]

    monkeypatch.setattr(evaluate, "bench", bench)
    return asked


def test_demo(run: Run, source: Path, tmp_path: Path, asked: list[list[str | Path]]) -> None:
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
    assert asked == [[str(tmp_path / "demo-recovered"), str(source)]]
    assert [one["mode"] for one in values["speed"]] == ["auto", "checkpoint"]
    for left in ("demo.partial", "demo-recovered.partial"):  # by a kill just before their removal
        (tmp_path / left).mkdir()
    code, out, err = run(*options)  # finds what is there
    assert not list(tmp_path.glob("*.partial"))
    assert code == 0 and "perplexity" in out and "> hello" in out and "recovered by distill" in out
    assert err.count("exists already") == 2
    assert "4,000,000 (4.0 MB)" in out and "Try next:" in out and "demo:  60%" in err
    code, out, err = run(*options[:-1], "3")  # other steps: only that part is made again
    assert code == 0 and err.count("exists already") == 1 and "step 3 of 3" in err
    assert "recovered" not in run.json(*options[:-1], "0")


def test_demo_does_not_take_up_another_model(run: Run, source: Path, tmp_path: Path) -> None:
    """The same settings, so only the model's name tells them apart."""
    other = tiny.save(tmp_path / "other", num_hidden_layers=1)
    options = ["-o", tmp_path / "demo", "--bpw", "7", "--no-calibration", "--windows", "2", "--context", "32"]
    options += ["--prompt", "hello", "--recover-steps", "0"]
    assert run.json("demo", "--model", source, *options)["report"]["model"] == str(source)
    code, _, err = run("demo", "--model", other, *options)
    assert code == 1 and "pass --overwrite" in err
    values = run.json("demo", "--model", other, *options, "--overwrite")
    assert values["report"]["model"] == str(other)
    code, _, err = run("demo", "--model", other, *options, "--overwrite")
    assert code == 0 and "exists already" in err  # the same one is not made again


def test_demo_takes_the_windows_that_the_text_has(
    run: Run, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says before the work begins that it has none."""
    text = ("a short text", "a short text. " * 10)
    monkeypatch.setattr("pocketllm.text.evaluation_text", lambda: text)
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
    from pocketllm.text.default_texts import evaluation_text

    monkeypatch.delenv("POCKETLLM_DATA", raising=False)
    name, text = evaluation_text()
    assert "Python" in name and len(text) > 5 * 1024 * 4


def test_the_stages_in_one_command(run: Run, source: Path, text: Path, tmp_path: Path) -> None:
    options = ["compress", source, "-o", tmp_path / "out", *SETTINGS, "--ppl", text, "--context", "32"]
    options += ["--windows", "3"]
    recover = ["--recover", "distill", "--recover-text", text, "--overwrite"]
    found = run.json(*options, *recover, "--set", "recover.steps=2", "--set", "recover.context=32")
    assert set(found["measured"]) == {"dense", "compressed", "recovered"}
    assert found["recover"]["steps"] == 2
    for title, folder in (("dense", source), ("recovered", tmp_path / "out")):
        wanted = run.json("eval", folder, *options[-6:])["perplexity"]
        assert found["measured"][title]["perplexity"] == pytest.approx(wanted)
    code, out, _ = run(*options, "--overwrite")
    assert code == 0 and "compressed" in out and "recovered" not in out
    code, _, err = run(*options, "--set", "recover.steps=2", "--overwrite")
    assert code == 2 and "needs --recover distill" in err
    code, _, err = run(*options, "--recover", "lora", "--overwrite")
    assert code == 2 and "wanted distill" in err
