"""The studies of whole models, on tiny ones: what is compared is what it is said to be."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pocketllm
from pocketllm.evaluate.kl import text_divergence
from pocketllm.format.checkpoint import read_report
from pocketllm.plan.target import planned
from pocketllm.report.model_facts import read_model
from pocketllm.runtime.decode import Matrices
from pocketllm.studies import load, run_study
from pocketllm.studies.measure import codebook_steps, decoder_steps, sensitivity_steps as sensitive
from pocketllm.studies.measure.compressed_models import dense_model, installed
from tests import tiny
from tests.studies import setup_of, small_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_model(tmp_path_factory)


@pytest.fixture(autouse=True)
def _no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POCKETLLM_DATA", raising=False)


@pytest.mark.parametrize("study", ["sensitivity", "decoder", "overhead", "robustness"])
def test_steps_of_both_sizes_have_keys_of_their_own(study: str, model: str, tmp_path: Path) -> None:
    for quick in (True, False):
        keys = [step.key for step in load(study).measurement.steps(setup_of(model, tmp_path, quick))]
        assert len(set(keys)) == len(keys) > 1


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of 64 positions, fewer than any study's windows have tokens."""
    folder = tmp_path_factory.mktemp("short") / "dense"
    return str(tiny.save(folder, max_position_embeddings=64, num_hidden_layers=3))


@pytest.mark.parametrize("study", ["sensitivity", "decoder", "robustness"])
def test_windows_are_cut_to_the_positions_of_the_model(
    study: str, short: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder_steps, "_QUICK", ("none-kind", "affine-matrix"))
    results = run_study(study, short, tmp_path / "out", quick=True).result["results"]
    found = {
        "sensitivity": lambda: results["plain-parts"]["context"],
        "decoder": lambda: results["none-kind"]["before"]["context"],
        "robustness": lambda: results["dense"]["context"],
    }
    assert found[study]() == 64
    if study == "decoder":
        assert results["none-kind"]["config"]["context"] == 64


def test_the_codebook_study_cuts_its_windows_too(short: str, tmp_path: Path) -> None:
    setup = setup_of(short, tmp_path)
    assert codebook_steps._perplexity(setup, *dense_model(setup), lambda share: None)["context"] == 64


# sensitivity


def test_calibrated_sensitivity_codes_everything_alike(model: str, tmp_path: Path) -> None:
    setup = setup_of(model, tmp_path, quick=False)
    plan = planned(setup.source(), sensitive.configs(setup)["calibrated"], model).plan
    assert {spec.index_bpw for spec in plan.specs.values()} == {3.0}


def test_the_whole_put_together_is_the_compressed_model(model: str, tmp_path: Path) -> None:
    done = run_study("sensitivity", model, tmp_path / "out", quick=True)
    setup = setup_of(model, tmp_path)
    folder = tmp_path / "again"
    pocketllm.compress(model, sensitive.configs(setup)["plain"], folder)
    own, tokenizer = pocketllm.load(folder, mode="dense", dtype=dense_model(setup)[0].dtype)
    text = setup.evaluation_texts()[0].text
    seen = text_divergence(own, dense_model(setup)[0], tokenizer, text, 256, 2)
    values = done.result["results"]["plain-parts"]
    groups = values["groups"]
    assert groups[sensitive.ALL]["kl"] == pytest.approx(seen.kl, rel=1e-6)
    assert values["dense"] == pytest.approx(seen.reference_perplexity, rel=1e-6)
    parts = [groups[name] for name in (sensitive.FFN, sensitive.ATTENTION, sensitive.ENDS)]
    assert sum(p["weights"] for p in parts) == groups[sensitive.ALL]["weights"]
    kinds = [groups[name] for name in groups if "_proj" in name]
    ends = groups[sensitive.ENDS]["saved_bytes"]
    report = read_report(folder)
    stored = sum(report["bytes_by_part"][p] for p in ("indices", "row_scales", "codebooks", "decoders"))
    saved = 2 * groups[sensitive.ALL]["weights"] - stored
    assert sum(k["saved_bytes"] for k in kinds) + ends == pytest.approx(saved, rel=1e-4)
    each = done.result["results"]["plain-blocks"]["groups"]
    assert list(each) == [str(n) for n in range(3)]
    assert all(0 < block["kl"] < groups[sensitive.ALL]["kl"] for block in each.values())


def test_matrices_are_put_in_and_taken_out_again(model: str, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    pocketllm.compress(model, tiny.settings(), folder)
    dense, _ = dense_model(setup_of(model, tmp_path))
    before = {name: value.clone() for name, value in dense.named_parameters()}
    matrices, chosen = Matrices.open(folder), "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(KeyError), installed(dense, matrices, [chosen]):
        for name, value in dense.named_parameters():
            assert torch.equal(value, before[name]) is (name != chosen)
        assert torch.equal(dense.get_parameter(chosen), matrices.read(chosen).to(dense.dtype))
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in dense.named_parameters())


def test_parts_by_name(tmp_path: Path) -> None:
    for architecture in ("gpt2", "mixtral"):
        pocketllm.compress(
            tiny.save(tmp_path / architecture, architecture),
            tiny.settings(codebook_size=16),
            tmp_path / f"{architecture}-c",
        )
        facts = read_model(tmp_path / f"{architecture}-c").matrices
        found = sensitive.parts(facts)
        names = {name: {m.kind for m in found[name]} for name in (sensitive.FFN, sensitive.ATTENTION)}
        assert all("attn" in kind for kind in names[sensitive.ATTENTION])
        assert names[sensitive.FFN] and not any("attn" in kind for kind in names[sensitive.FFN])


# decoder


def test_no_variant_stores_more_than_the_reference(model: str, tmp_path: Path) -> None:
    setup = setup_of(model, tmp_path)
    found = decoder_steps.variants(setup)
    assert {"affine-matrix", "mlp-matrix", "row-kind", "none-model"} <= set(found)
    stored = {}
    for key, variant in found.items():
        parts = pocketllm.dry_run(model, variant.config).bytes_by_part
        stored[key] = parts["codebooks"] + parts["decoders"]
    budget = stored["none-kind"]
    assert all(nbytes <= budget for nbytes in stored.values())
    for key, variant in found.items():
        if variant.equal:  # less than a codeword, or a column of every decoder, is left over
            assert stored[key] > 0.8 * budget, key


def test_decoder_study(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_steps, "size_of", lambda setup: decoder_steps.Size(2, 64, 3, 2, 32, 2))
    monkeypatch.setattr(decoder_steps, "_QUICK", ("none-kind", "affine-matrix"))
    done = run_study("decoder", model, tmp_path / "out", quick=True)
    results = done.result["results"]
    assert results["none-kind"]["decoder_bytes"] == 0
    assert results["affine-matrix"]["decoder_bytes"] == 14 * 2 * (16 + 4)
    for values in results.values():
        assert values["after"]["kl"] != values["before"]["kl"]
        assert 0 < values["nmse"] < 0.3
    assert "At equal stored bytes the claim" in done.result["findings"][0]


# overhead
