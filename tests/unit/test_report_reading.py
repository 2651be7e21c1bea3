"""What a report reads of a model: its matrices, codebooks, weights, and what it says of itself."""

from __future__ import annotations

import dataclasses
import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pocketllm
from pocketllm.config import Command
from pocketllm.errors import (
    FormatError,
    SourceError,
)
from pocketllm.report import weight_distributions
from pocketllm.report.codebook_usage import codebooks_section, count_usage
from pocketllm.report.model_facts import AdapterFacts, block_of, mean, read_model
from pocketllm.report.recipe import recipe_section
from pocketllm.report.rendering import render_section
from pocketllm.report.sections import error_section
from pocketllm.report.weight_distributions import compare_weights
from pocketllm.runtime.decode import Matrices
from pocketllm.source import builtin
from pocketllm.source.dense_checkpoint import resolve_local
from tests import tiny
from tests.reports import paragraphs

UP = "model.layers.1.mlp.up_proj.weight"


def edit(folder: Path, change: Any) -> None:
    """Change the report of a compressed model."""
    path = folder / "pocketllm.json"
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


# --- decoding single matrices


def test_decoded_matrices_are_those_of_the_model(small: Path) -> None:
    model, _ = pocketllm.load(small, mode="dense", dtype=torch.float32)
    matrices = Matrices.open(small)
    assert all(torch.equal(matrices.read(n), model.get_parameter(n)) for n in matrices.names())
    assert matrices.indices(UP).shape == (52, 8)


@pytest.mark.parametrize("source_of_codebook", ["fit", "hashed", "seed"])
def test_matrices_on_a_trellis(source_of_codebook: str, source: Path, tmp_path: Path) -> None:
    codec = {
        "trellis_width": 9 if source_of_codebook == "hashed" else 6,
        "codebook_source": source_of_codebook,
    }
    config = tiny.target(5.0, codec=codec)
    pocketllm.compress(source, config, tmp_path / "out")
    expected, _ = pocketllm.load(tmp_path / "out", mode="dense", dtype=torch.float32)
    matrices, model = Matrices.open(tmp_path / "out"), read_model(tmp_path / "out")
    assert all(torch.equal(matrices.read(n), expected.get_parameter(n)) for n in matrices.names())
    assert model.matrices[-1].stride > 0 and sum(usage.covered[-1] for usage in count_usage(model)) > 0
    assert error_section(model).tables[-1].headers[4] == "stride"


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_a_tensor_that_is_missing_or_of_another_size(damage: str, copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    if damage == "missing":
        del tensors[f"{UP}.indices"]
    else:
        tensors[f"{UP}.indices"] = tensors[f"{UP}.indices"][:-1].clone()
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    words = {"missing": "no file contains it", "shape": "stored as"}[damage]
    with pytest.raises(FormatError, match=f"{UP}.indices: {words}"):
        Matrices.open(copy).read(UP)


def test_a_weight_file_that_is_cut_off(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(FormatError, match="not a readable safetensors file"):
        Matrices.open(copy)


# --- what the model says of itself


def test_blocks_are_counted_with_those_left_dense(source: Path, tmp_path: Path) -> None:
    pocketllm.compress(source, tiny.settings(dense_first=1), tmp_path / "out")
    model = read_model(tmp_path / "out")
    assert model.blocks == 2 and [m.name for m in model.outside] == ["model.embed_tokens.weight"]
    grid = model.grid(lambda m: m.nmse)
    assert all(cell is None for cell in grid[0]) and all(cell is not None for cell in grid[1])


def test_several_matrices_of_a_kind_in_a_block_are_averaged_by_size(small: Path) -> None:
    model = read_model(small, check=False)
    pair = [m for m in model.matrices if m.name.endswith(("q_proj.weight", "k_proj.weight"))]
    expected = sum(m.nmse * m.weights for m in pair if m.nmse) / sum(m.weights for m in pair)
    assert mean(pair, lambda m: m.nmse) == pytest.approx(expected)
    assert mean(pair, lambda m: None) is None and mean([], lambda m: m.nmse) is None


def test_block_numbers() -> None:
    assert block_of("model.layers.12.mlp.experts.3.up.weight") == 12
    assert block_of("lm_head.weight") is None


def test_new_keys_and_missing_values_do_no_harm(copy: Path) -> None:
    def change(values: dict[str, Any]) -> None:
        values["new"] = {"key": 1}
        values["fits"] = [{"unknown": 1}]
        del values["versions"]
        for matrix in values["matrices"]:
            matrix["window"] = 3
            matrix["nmse"] = None
            del matrix["proxy_error"], matrix["codebook_utilization"]

    edit(copy, change)
    model = read_model(copy)
    section = error_section(model)
    assert not section.charts and "without calibration" in paragraphs(section)[1]
    section = codebooks_section(model, [])
    assert not section.charts and section.tables
    assert len(recipe_section(model, Command(), Command()).tables) == 1


def test_fine_tuning_is_told(copy: Path) -> None:
    edit(copy, lambda values: values.update(recover={"steps": 3, "loss": {"kl": 0.5}}))
    section = recipe_section(read_model(copy, check=False), Command("command", ("depth",)), Command())
    table = next(t for t in section.tables if t.caption == "Fine-tuning")
    assert list(table.rows) == [("steps", "3"), ("loss.kl", "0.5")]
    assert (
        "missing from the command below: depth" in paragraphs(section)[1]
        and "fine-tuned" in paragraphs(section)[2]
    )


@pytest.mark.parametrize(
    ("command", "training", "words"),
    [
        ("a", "b", ["The commands that reproduce the model and then the adapter:"]),
        (
            "a",
            "",
            ["does not know the settings that it was trained with.", "The command that reproduces it:"],
        ),
        ("", "b", ["does not know its settings;", "The command that reproduces the adapter:"]),
        ("", "", ["does not know the settings that it was trained with.", "does not know its settings;"]),
    ],
)
def test_commands_that_are_known_are_introduced(
    command: str, training: str, words: list[str], small: Path, tmp_path: Path
) -> None:
    adapter = AdapterFacts(tmp_path / "tuned", bytes=5, settings={}, record={"config": {"rank": 4}})
    model = dataclasses.replace(read_model(small, check=False), adapter=adapter)
    section = recipe_section(model, Command(command), Command(training, ("loop.warmup",)))
    said = paragraphs(section)
    assert said[1] == "The adapter tuned was trained on it afterwards; the compressed model was not changed."
    found = [word for word in words if not any(word in text for text in said)]
    assert not found and ("missing from its command: loop.warmup" in " ".join(said)) == bool(training)
    assert render_section(section).count("<pre>") == bool(command) + bool(training)
    assert len(said) == 2 + len(words) + bool(training)


@pytest.mark.parametrize(
    "key", ["matrices", "bytes_on_disk", "bpw_all", "bytes_by_part", "model", "skipped", "config"]
)
def test_a_report_that_lacks_something(key: str, copy: Path) -> None:
    edit(copy, lambda values: values.pop(key))
    with pytest.raises(FormatError, match=f"damaged .{key}: got None"):
        read_model(copy)


def test_a_report_that_says_nothing_of_a_matrix(copy: Path) -> None:
    edit(copy, lambda values: values["matrices"].pop(3))
    with pytest.raises(FormatError, match=r"damaged \(model\..* is missing"):
        read_model(copy)


def test_a_dense_model_is_no_compressed_one(source: Path) -> None:
    with pytest.raises(FormatError, match="not a model compressed"):
        read_model(source)


# --- codebooks


def test_use_is_counted_in_the_indices(source: Path, tmp_path: Path) -> None:
    pocketllm.compress(source, tiny.settings(codebook_scope="matrix"), tmp_path / "out")
    model = read_model(tmp_path / "out")
    usages = count_usage(model)
    assert len(usages) == len(model.matrices)
    for usage in usages:
        matrix = next(m for m in model.matrices if m.codebook == usage.codebook)
        assert usage.used == pytest.approx(matrix.utilization, rel=1e-5)
        assert usage.covered[0] == 0 and usage.covered[-1] == pytest.approx(1)
        steps = [b - a for a, b in pairwise(usage.covered)]
        assert all(b <= a + 1e-12 for a, b in pairwise(steps)) and usage.covered[50] >= 0.5
    section = codebooks_section(model, usages)
    assert [len(chart.table.rows) for chart in section.charts] == [15, 11]
    page = render_section(section)
    assert 'aria-label="Heat map of codewords in use' in page and "<p>Counted in" in page
    assert "Of 15 codebooks: " in page.split("evenness-caption", 1)[1]


# --- weights


def test_distributions(small: Path, source: Path) -> None:
    model = read_model(small)
    told: list[float] = []
    found = compare_weights(model, progress=lambda share, detail: told.append(share))
    assert not found.absent and not found.mismatch and found.source == str(source)
    assert told == sorted(told) and told[-1] == 1.0
    for kind in found.kinds:
        assert sum(kind.original) == pytest.approx(1) and sum(kind.decoded) == pytest.approx(1)
        for name, nmse in kind.nmse.items():
            stored = next(m.nmse for m in model.matrices if m.name == name)
            assert nmse == pytest.approx(stored, rel=1e-4)
    up = next(kind for kind in found.kinds if kind.kind == "mlp.up_proj")
    weights = torch.cat(
        [t.flatten() for n, t in load_file(source / "model.safetensors").items() if "up_proj" in n]
    )
    moments = up.moments["original"]
    assert moments.count == len(weights) and moments.largest == float(weights.abs().max())
    assert moments.rms == pytest.approx(float(weights.double().square().mean().sqrt()))
    fourth = float((weights.double() ** 4).mean())
    assert moments.kurtosis == pytest.approx(fourth / moments.rms**4)


def test_the_bins_are_those_of_all_matrices(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first matrix with small weights does not push the weights of the others into the outermost bins."""

    class Pretended:
        def read(self, name: str) -> torch.Tensor:
            generator = torch.Generator().manual_seed(0)
            return torch.randn(40, 50, generator=generator) * (0.01 if name == "first" else 1.0)

    pretended: Any = Pretended()
    names = ["first", "second", "third"]
    found = weight_distributions._distribution(
        "kind", names, of=3, source=pretended, decoded=pretended, progress=lambda name: None
    )
    rms = found.moments["original"].rms
    assert found.edges[-1] == pytest.approx(weight_distributions.WIDTH * rms) and rms == pytest.approx(
        (2 / 3) ** 0.5, rel=0.05
    )
    assert found.moments["original"].count == found.moments["decoded"].count == 3 * 2000
    assert found.original[0] + found.original[-1] < 0.01
    assert found.nmse == dict.fromkeys(names, 0.0)


def test_no_dense_model_here(copy: Path) -> None:
    edit(copy, lambda values: values.update(model="./gone"))
    assert "not on this machine" in compare_weights(read_model(copy)).absent


def test_another_dense_model(small: Path, tmp_path: Path) -> None:
    model = read_model(small)
    other = tiny.save(tmp_path / "other", intermediate_size=40)
    with pytest.raises(SourceError, match=r"of shape .* not the model that was compressed"):
        compare_weights(model, str(other))
    gpt = tiny.save(tmp_path / "gpt", "gpt2")
    with pytest.raises(SourceError, match="has no model"):
        compare_weights(model, str(gpt))
    shutil.rmtree(tmp_path / "other")
    with pytest.raises(SourceError, match="no such folder"):
        compare_weights(model, str(other))


def test_a_dense_model_found_by_itself_that_does_not_fit(copy: Path, tmp_path: Path) -> None:
    other = tiny.save(tmp_path / "other", intermediate_size=40)
    edit(copy, lambda values: values.update(model=str(other)))
    assert "cannot be used" in compare_weights(read_model(copy)).absent


def test_the_same_shapes_but_other_weights(small: Path, tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = tiny.model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "other")
    found = compare_weights(read_model(small), str(tmp_path / "other"))
    assert "the stored one" in found.mismatch


def test_where_models_are_looked_for(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETLLM_CACHE", str(tmp_path))
    assert resolve_local(str(source)) == source
    assert resolve_local("./nowhere/at/all") is None and resolve_local("nobody/nothing") is None
    assert builtin.cached("builtin:unknown") is None and resolve_local("builtin:smollm2-135m") is None
    folder = tmp_path / "smollm2-135m-0.1.2-2"
    folder.mkdir()
    (folder / "config.json").touch()
    assert resolve_local("builtin:smollm2-135m") == folder
