"""Calibration from the command line: the keys that others rely on, options, warnings, exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pocketllm.format.checkpoint import read_report
from tests import tiny
from tests.commands import SETTINGS, SIZES, Run


@pytest.fixture(scope="module")
def text(source: Path) -> Path:
    path = source.parent / "text.txt"
    path.write_text("a text that is long enough for some windows. " * 50, encoding="utf-8")
    return path


def test_keys(run: Run, source: Path, text: Path, tmp_path: Path) -> None:
    options = [*SETTINGS, "--calibration", text, "--set", "calibration.tokens=1024"]
    options += ["--calibration-cache", tmp_path / "measured"]
    planned = run.json("compress", source, "-o", tmp_path / "out", *options, "--dry-run")
    report = run.json("compress", source, "-o", tmp_path / "out", *options)
    assert set(report) >= {*SIZES, "seconds", "peak_memory_bytes"}
    assert report["seconds"] > 0 and report["peak_memory_bytes"] > 100 * 2**20
    assert planned["bytes_on_disk"] == report["bytes_on_disk"]
    for matrix in report["matrices"]:
        assert set(matrix) >= {"name", "shape", "bpw", "nmse", "proxy_error", "codebook_utilization"}
        assert 0 < matrix["proxy_error"] < 1
    assert {m["input_tokens"] for m in report["matrices"]} == {1024, None}
    info = run.json("info", tmp_path / "out")
    assert all(info[key] == report[key] for key in SIZES)
    assert info["seconds"] is None and info["peak_memory_bytes"] is None
    assert "seconds" not in read_report(tmp_path / "out")
    assert len(list((tmp_path / "measured").glob("sensitivity-*.safetensors"))) == 1


def test_options_reach_the_settings(run: Run, source: Path, text: Path, tmp_path: Path) -> None:
    given = [
        "refine_epochs=2",
        "passes=1",
        "two_sided=false",
        "rotate=false",
        "sequential=false",
        "tokens=512",
    ]
    options = [*SETTINGS, "--calibration", text, "--calibration", text]
    options += [word for setting in given for word in ("--set", f"calibration.{setting}")]
    options += ["--calibration-cache", tmp_path / "measured"]
    report = run.json("compress", source, "-o", tmp_path / "out", *options)
    found = report["config"]["calibration"]
    assert found["texts"] == [str(text)] * 2 and found["tokens"] == 512
    assert found["refine_epochs"] > 0 and found["passes"] == 1
    assert not found["rotate"] and not found["sequential"] and not found["two_sided"]
    assert len(list((tmp_path / "measured").glob("inputs-*/*.safetensors"))) == 2
    again = run.json(
        "compress", source, "-o", tmp_path / "two", *options, "--set", "calibration.refine_epochs=0"
    )
    assert again["config"]["calibration"]["refine_epochs"] == 0


def test_little_text_is_told(run: Run, source: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("too little text.")
    options = ["-o", tmp_path / "out", *SETTINGS, "--calibration", tmp_path / "text.txt"]
    options += ["--calibration-cache", tmp_path / "measured"]
    code, out, err = run("compress", source, *options)
    assert code == 0 and "16 tokens are fewer than the widest layer has inputs (52)" in err
    assert "warning" in out and "fewer tokens than inputs" in " ".join(out.split())
    code, out, err = run("compress", source, *options, "--quiet", "--overwrite")
    assert code == 0 and not err
    assert run("info", tmp_path / "out")[1].count("warning") == 1


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--bpw", "3", "--size", "30MB"], 2, "--bpw and --size cannot be combined; give one"),
        (["--ratio", "3", "--preset", "calibrated-8x"], 2, "--preset and --ratio cannot be combined"),
        (["--size", "1kB"], 2, "the possible range is"),
        (["--size", "1TB"], 2, "the possible range is"),
        (["--ratio", "200"], 2, "the possible range is"),
        (["--override", "x"], 2, "wanted PATTERN=BITS"),
        (["--override", "nothing.*=4"], 2, "'nothing.*': matches no matrix"),
        (
            ["--preset", "lookup-8x", "--set", "calibration.refine_epochs=2"],
            2,
            "the preset does not calibrate",
        ),
        (["--preset", "lookup-8x", "--compensate", "2"], 2, "--compensate: the preset does not calibrate"),
        (
            ["--no-calibration", "--compensate", "2"],
            2,
            "--no-calibration cannot be combined with --compensate",
        ),
        (["--set", "calibration.compensate=2"], 2, "use the option --compensate"),
        (
            ["--no-calibration", "--set", "calibration.rotate=false"],
            2,
            "--no-calibration cannot be combined with calibration.rotate",
        ),
        (
            [*SETTINGS, "--calibration", "TEXT", "--set", "calibration.tokens=1"],
            2,
            "calibration.tokens: got 1",
        ),
        ([*SETTINGS, "--calibration", "nowhere.txt"], 1, "no such file"),
        ([*SETTINGS, "--calibration", "owner/nothing-here"], 1, "nor a data set that the Hub provides"),
        ([*SETTINGS, "--calibration", "BINARY"], 1, "not UTF-8"),
        ([*SETTINGS, "--calibration", "EMPTY"], 1, "file in this folder"),
        ([*SETTINGS, "--calibration", "LETTER"], 1, "the texts have 1 tokens"),
    ],
)
def test_errors(
    options: list[str], code: int, words: str, run: Run, source: Path, text: Path, tmp_path: Path
) -> None:
    places = {
        "TEXT": text,
        "BINARY": tmp_path / "b.txt",
        "LETTER": tmp_path / "c.txt",
        "EMPTY": tmp_path / "e",
    }
    places["EMPTY"].mkdir()
    places["BINARY"].write_bytes(b"\x80\x81")
    places["LETTER"].write_text("a")
    given = [places.get(option, option) for option in options]
    found, out, err = run("compress", source, "-o", tmp_path / "out", *given)
    assert found == code, err
    assert words in " ".join(err.split()) and not out and "Traceback" not in err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_the_plan_of_the_default_preset(run: Run, tmp_path: Path) -> None:
    """At the real size of its codebooks, which a model of a million weights can just pay for."""
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 6, "vocab_size": 512}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    source = tiny.save(tmp_path / "dense", **sizes, **heads)
    cache = ["--calibration-cache", tmp_path / "measured", "--set", "calibration.tokens=4096", "--dry-run"]
    found = run.json("compress", source, "-o", tmp_path / "out", "--size", "600kB", *cache)
    assert 0.99 * 600_000 <= found["bytes_on_disk"] <= 600_000
    found = run.json("compress", source, "-o", tmp_path / "out", "--ratio", "3.5", *cache)
    assert 3.5 <= found["ratio_files_bf16"] <= 1.01 * 3.5
    found = run.json("compress", source, "-o", tmp_path / "out", "--bpw", "4.5", *cache, "--keep-embeddings")
    assert 0.99 * 4.5 <= found["bpw_blocks"] <= 4.5
    assert json.dumps(found["config"]["calibration"]["sequential"]) == "true"
