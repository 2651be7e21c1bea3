"""The model card: README.md of a compressed folder, written with the model, counted, and free to be edited."""

from __future__ import annotations

import json
import logging
import shlex
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

import pocketllm
from pocketllm import DistillConfig
from pocketllm.errors import ConfigError, FormatError, OutputError, SourceError
from pocketllm.format import Figure, folder_bytes, read_report, verify, write_card
from pocketllm.format.model_card import card_text, dense_card_name, stored_names
from pocketllm.recover.base_model import identity
from pocketllm.report import perplexity_figure, read_figures
from tests import tiny
from tests.commands import SETTINGS, Run
from tests.unit.test_documented_commands import commands_in, parse

DENSE_CARD = "---\nlicense: gemma\nlanguage:\n- en\n- de\ntags:\n- chat\n---\n# The dense one\n"
PERPLEXITY = Figure("perplexity on a.txt, context 32, 2 windows", 20.5, 18.25, "perplexity", "a.txt")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense model that has a card."""
    folder = tiny.save(tmp_path_factory.mktemp("model") / "dense")
    (folder / "README.md").write_text(DENSE_CARD)
    return folder


def card(folder: Path) -> ModelCard:
    return ModelCard.load(folder / "README.md")


def test_it_says_what_the_files_are(small: Path) -> None:
    found, report = card(small), read_report(small)
    data = found.data.to_dict()
    assert (data["license"], data["language"], data["library_name"]) == (
        "gemma",
        ["en", "de"],
        "transformers",
    )
    assert "base_model" not in data  # a folder is none
    weights = (small / "model.safetensors").stat().st_size
    assert data["pocketllm"]["weight_bytes"] == weights and f"| {weights:,} |" in found.text
    assert data["pocketllm"]["bits_per_weight"] == report["bpw_matrices"]
    for part in ("indices", "row_scales", "codebooks", "decoders", "dense"):
        assert f"| {report['bytes_by_part'][part]:,} |" in found.text
    assert "[README.base.md](README.base.md)" in found.text
    assert (small / "README.base.md").read_text() == DENSE_CARD


def test_its_commands_parse_and_make_the_model_again(small: Path) -> None:
    text = card(small).text
    (made,) = [words for words in commands_in(text) if words[0] == "compress"]
    for words in commands_in(text):
        parse(words)
    assert made[1] == "./dense"
    assert shlex.split(card(small).data.to_dict()["pocketllm"]["command"])[1:] == made


def test_it_is_counted_and_has_no_checksum(small: Path) -> None:
    report = read_report(small)
    assert report["bytes_on_disk"] == folder_bytes(small)
    assert "README.md" not in report["files"] and "README.base.md" in report["files"]
    parts = report["bytes_by_part"]
    assert sum(parts.values()) == report["bytes_on_disk"]
    assert parts["other_files"] == sum(
        facts["bytes"]
        for name, facts in report["files"].items()
        if name not in ("model.safetensors", "config.json")
    )


def test_a_dry_run_knows_its_size(source: Path, small: Path) -> None:
    assert pocketllm.dry_run(source, tiny.settings()).bytes_on_disk == folder_bytes(small)


def test_the_same_input_gives_the_same_card(source: Path, small: Path, tmp_path: Path) -> None:
    pocketllm.compress(source, tiny.settings(), tmp_path / "again")
    assert (tmp_path / "again" / "README.md").read_bytes() == (small / "README.md").read_bytes()


def test_it_may_be_edited_and_removed(copy: Path) -> None:
    (copy / "README.md").write_text("# Mine\n")
    verify(copy)
    (copy / "README.md").unlink()
    verify(copy)
    (copy / "README.base.md").write_text("changed")
    with pytest.raises(FormatError, match=r"README\.base\.md: 7 bytes"):
        verify(copy)


def test_measured_values_are_added(copy: Path) -> None:
    before = identity(read_report(copy))
    write_card(copy, [PERPLEXITY], "owner/dense")
    verify(copy)
    found, report = card(copy), read_report(copy)
    assert "| perplexity on a.txt, context 32, 2 windows | 20.5 | 18.25 |" in found.text
    assert (
        found.data.base_model == "owner/dense" and found.data.to_dict()["base_model_relation"] == "quantized"
    )
    (result,) = found.data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("perplexity", 20.5, "a.txt")
    assert report["bytes_on_disk"] == folder_bytes(copy) == sum(report["bytes_by_part"].values())
    assert identity(report) == before  # adapters still fit
    write_card(copy)
    assert "perplexity" not in card(copy).text


def test_the_base_model_is_known_for_hub_ids_and_built_in_models(small: Path) -> None:
    report = read_report(small)
    names = {"owner/dense@v1": "owner/dense", "builtin:smollm2-135m": "HuggingFaceTB/SmolLM2-135M-Instruct"}
    for model, base in names.items():
        text = card_text({**report, "model": model})
        assert f"base_model: {base}\n" in text and f"# {base.split('/')[1]}, " in text
        assert f"pocketllm compress {model} -o small" in text
    assert "license: apache-2.0" in text
    assert "That of the dense model, whose card names none" in card_text(report)


def test_a_base_model_that_is_no_hub_id_is_refused(copy: Path) -> None:
    with pytest.raises(ConfigError, match="base_model: got 'x y z', wanted OWNER/NAME"):
        write_card(copy, base_model="x y z")


def test_it_is_kept_through_distillation(source: Path, small: Path, text: Path, tmp_path: Path) -> None:
    config = DistillConfig(texts=(str(text),), steps=2, context=32, validation_windows=2)
    result = pocketllm.distill(small, tmp_path / "tuned", config, teacher=str(source))
    found, report = card(tmp_path / "tuned"), read_report(tmp_path / "tuned")
    assert "Then tuned towards the dense model in 2 steps" in found.text
    assert found.data.license == "gemma"
    assert report["bytes_on_disk"] == folder_bytes(tmp_path / "tuned") == result.bytes_on_disk
    verify(tmp_path / "tuned")


def test_a_model_that_was_made_of_another(source: Path, tmp_path: Path) -> None:
    names = ["README.base.md", "README.md", "a/README.md", "readme.txt"]
    stored = stored_names(names)
    assert stored == {**dict(zip(names, names, strict=True)), "README.md": "README.base-2.md"}
    assert dense_card_name(stored.values()) == "README.base-2.md"
    assert stored_names(["readme.md", "x"]) == {"readme.md": "README.base.md", "x": "x"}
    assert dense_card_name(["README.md"]) is None


def test_metadata_that_cannot_be_read_is_left_out(
    small: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, metadata in enumerate(("license: [", "- a", "license: {a: b}", "license: [{a: b}]", "")):
        path = tmp_path / f"{number}.md"
        path.write_text(f"---\n{metadata}\n---\n" if metadata else "none")
        with caplog.at_level(logging.WARNING, "pocketllm"):
            assert "\nlicense: " not in card_text(read_report(small), path)
    named = [record.getMessage().split(":")[0] for record in caplog.records]
    assert named == [str(tmp_path / "0.md"), str(tmp_path / "1.md")]


def test_settings_of_a_later_version_have_no_command(small: Path) -> None:
    report = read_report(small)
    text = card_text({**report, "config": {**report["config"], "codec": 1}})
    assert "pocketllm compress" not in text and "command:" not in text


def test_a_card_with_a_checksum_is_not_replaced(copy: Path) -> None:
    """Early versions stored the dense model's README.md under its own name."""
    report = json.loads((copy / "pocketllm.json").read_text())
    report["files"]["README.md"] = report["files"].pop("README.base.md")
    (copy / "README.base.md").replace(copy / "README.md")
    (copy / "pocketllm.json").write_text(json.dumps(report))
    verify(copy)
    with pytest.raises(FormatError, match=r"README\.md: belongs to the dense model and has a checksum"):
        write_card(copy)


def test_the_dense_model_s_card_is_a_file(copy: Path, tmp_path: Path) -> None:
    (copy / "README.base.md").unlink()
    with pytest.raises(FormatError, match=r"README\.base\.md: missing"):
        write_card(copy)


def test_a_card_that_cannot_be_written(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    before = {path.name: path.read_bytes() for path in copy.iterdir()}
    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(OutputError, match="the disk is full"):
        write_card(copy, [PERPLEXITY])
    assert {path.name: path.read_bytes() for path in copy.iterdir()} == before


def test_compress_writes_what_it_measures(source: Path, text: Path, tmp_path: Path, run: Run) -> None:
    measuring = ["--ppl", text, "--context", "32", "--windows", "2"]
    found = run.json("compress", source, "-o", tmp_path / "out", "--no-calibration", *SETTINGS, *measuring)
    own, dense = (found["measured"][title]["perplexity"] for title in ("compressed", "dense"))
    assert (
        f"| perplexity on text.txt, context 32, 2 windows | {own:.4g} | {dense:.4g} |"
        in card(tmp_path / "out").text
    )
    assert (
        found["bytes_on_disk"]
        == folder_bytes(tmp_path / "out")
        == read_report(tmp_path / "out")["bytes_on_disk"]
    )


def evaluation(path: Path, **changes: Any) -> Path:
    values = {
        "model": str(path.parent),
        "compressed": True,
        "text": "texts/a.txt",
        "context": 32,
        "windows": 2,
        "perplexity": 20.5,
        "kl": 0.25,
        "top1_agreement": None,
        "tasks": {"piqa": {"acc": 0.5, "acc_norm": None}, "boolq": {"acc": 0.25}},
        "limit": 40,
        "against": {"perplexity": 18.25, "tasks": {"piqa": {"acc": 0.75}}},
    }
    path.write_text(json.dumps(values | changes))
    return path


def test_figures_of_an_evaluation(tmp_path: Path) -> None:
    found = read_figures(evaluation(tmp_path / "eval.json"), tmp_path)
    setting = " on a.txt, context 32, 2 windows"
    assert found == [
        perplexity_figure("texts/a.txt", 32, 2, own=20.5, dense=18.25),
        Figure(
            f"KL divergence from the dense model, nats per token{setting}",
            0.25,
            None,
            "kl_divergence",
            "a.txt",
        ),
        Figure("piqa, first 40, accuracy", 0.5, 0.75, "acc", "piqa"),
        Figure("boolq, first 40, accuracy", 0.25, None, "acc", "boolq"),
    ]
    alone = evaluation(tmp_path / "alone.json", against=None, tasks=None, limit=None)
    assert [figure.dense for figure in read_figures(alone, tmp_path)] == [None, None]


def test_figures_of_another_folder_are_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "pocketllm"):
        read_figures(evaluation(tmp_path / "eval.json", model="/elsewhere/small"), tmp_path)
    assert "was measured on /elsewhere/small; make sure that this is" in caplog.text


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read"),
        ("{", "not JSON"),
        ("[]", "not of a compressed model alone"),
        ('{"compressed": false, "perplexity": 3}', "not of a compressed model alone"),
        ('{"compressed": true, "adapter": "a", "perplexity": 3}', "not of a compressed model alone"),
        ('{"compressed": true, "perplexity": null, "kl": true}', "no finite value"),
    ],
)
def test_files_without_figures(content: str | None, words: str, tmp_path: Path) -> None:
    path = tmp_path / "eval.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(SourceError, match=words):
        read_figures(path, tmp_path)


def test_the_command(copy: Path, text: Path, run: Run, tmp_path: Path) -> None:
    code, out, _ = run("eval", copy, "--ppl", text, "--context", "32", "--windows", "2", "--json")
    (tmp_path / "eval.json").write_text(out)
    found = run.json("card", copy, "--evaluation", tmp_path / "eval.json", "--base-model", "owner/dense")
    assert code == 0 and found["figures"] == ["perplexity on text.txt, context 32, 2 windows"]
    assert Path(found["card"]).read_text().count("owner/dense") > 1
    assert run("info", copy)[0] == 0
