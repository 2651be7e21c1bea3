"""`pocketllm report --adapter`: a compressed model and an adapter of it on one page."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from pocketllm.errors import ConfigError, FormatError
from pocketllm.format.checkpoint import folder_bytes, read_report
from pocketllm.format.report import counting_adapter
from pocketllm.report import compare, html_report
from tests import reports
from tests.commands import Run
from tests.reports import MEASURE

pytest.importorskip("peft")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `reports.make`, with the adapter `tuned`."""
    folder = reports.make(tmp_path_factory.mktemp("report"))
    reports.make_adapter(folder)
    return folder


def test_base_and_adapter_on_one_page(run: Run, folder: Path) -> None:
    small, tuned = folder / "small", folder / "tuned"
    found = run.json("report", small, "--adapter", tuned, "--ppl", folder / "text.txt", *MEASURE)
    output = folder / "small-with-tuned.html"
    assert found["output"] == str(output) and found["adapter"] == str(tuned)
    both, base, dense = found["evaluations"]
    assert (both["adapter"], base["adapter"], dense["compressed"]) == (str(tuned), "", False)
    assert both["bytes_on_disk"] == folder_bytes(small) + folder_bytes(tuned)
    assert both["perplexity"] != base["perplexity"]
    page = output.read_text(encoding="utf-8")
    assert "<h1>small + tuned</h1>" in page and "together with the adapter tuned" in page
    assert f"{both['perplexity']:.4g}" in page and f"{base['perplexity']:.4g}" in page and "Note:" not in page
    assert page.index(">compressed, with adapter<") < page.index(">compressed<")
    assert page.count("of the base alone") == 3  # bits, errors, weights
    assert found["adapter_command"].startswith("pocketllm finetune small -o tuned --method lora ")
    assert "--set loop.warmup=" in found["adapter_command"] and not found["missing"]
    assert '<th scope="row">config.rank</th>' in page


def test_its_bytes_are_counted_as_in_a_comparison(folder: Path, tmp_path: Path) -> None:
    small, tuned = folder / "small", folder / "tuned"
    page = html_report(small, tmp_path / "x.html", adapter=tuned).output.read_text(encoding="utf-8")
    counted = counting_adapter(read_report(small), folder_bytes(tuned))
    row = compare([small], adapters=[tuned]).models[1]
    assert counted["bpw_all"] == row.bpw_all and f"{counted['bpw_all']:.3g} over every parameter" in page
    assert f"{row.ratio_files_bf16:.2f}× smaller" in page and f"{row.bytes_on_disk:,}" in page
    assert f'<th scope="row">adapter</th>\n<td class="number">{folder_bytes(tuned):,}</td>' in page


def test_evaluations_of_base_and_adapter(run: Run, folder: Path, tmp_path: Path) -> None:
    small, tuned, text = folder / "small", folder / "tuned", folder / "text.txt"
    values = run.json("eval", small, "--adapter", tuned, "--ppl", text, *MEASURE)
    shutil.copytree(tuned, tmp_path / "moved")
    paths = []
    for name, changes in {"own": {}, "other": {"adapter": "elsewhere/other"}}.items():
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps({**values, **changes}))
    options = ["--adapter", tuned, "--evaluation"]
    run.json("report", small, "-o", tmp_path / "own.html", *options, paths[0])
    page = (tmp_path / "own.html").read_text(encoding="utf-8")
    assert f"{small} + tuned" in page and "Note:" not in page
    run.json("report", small, "-o", tmp_path / "other.html", *options, paths[1])
    assert "is with the adapter elsewhere/other, not with tuned" in (tmp_path / "other.html").read_text()
    run.json("report", small, "-o", tmp_path / "base.html", "--evaluation", paths[0])
    nbytes = folder_bytes(small) + folder_bytes(tuned)
    assert f"is of {nbytes:,} bytes, this model has {folder_bytes(small):,}" in (
        tmp_path / "base.html"
    ).read_text(encoding="utf-8")


def test_an_adapter_that_was_trained_elsewhere(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "tuned", tmp_path / "foreign")
    (tmp_path / "foreign" / "pocketllm-adapter.json").unlink()
    found = html_report(folder / "small", tmp_path / "x.html", adapter=tmp_path / "foreign")
    page = found.output.read_text(encoding="utf-8")
    assert not found.adapter_command and found.command
    assert "trained on it elsewhere" in page and '<th scope="row">lora_alpha</th>' in page


def test_an_adapter_of_another_model(run: Run, folder: Path, tmp_path: Path) -> None:
    arguments = ["--adapter", folder / "tuned", "-o", tmp_path / "x.html", "--ppl", tmp_path / "no.txt"]
    code, out, err = run("report", folder / "other", *arguments)
    assert code == 2 and not out and "name the base it was trained on" in err  # before --ppl is looked at
    with pytest.raises(ConfigError, match="was trained on"):
        html_report(folder / "other", tmp_path / "x.html", adapter=folder / "tuned")
    with pytest.raises(FormatError, match="wanted an adapter in PEFT's format"):
        html_report(folder / "small", tmp_path / "x.html", adapter=folder / "other")
    assert not list(tmp_path.iterdir())
