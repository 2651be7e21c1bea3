"""The studies of the codec on a tiny model: what is measured is what it is said to be, findings follow from it."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import pocketllm
from pocketllm.config import CodecConfig, CompressConfig
from pocketllm.errors import SourceError
from pocketllm.studies import codebook, depth, noise, overfit, rln, run_study, trials, utilization
from pocketllm.studies.repeated import exploded
from pocketllm.studies.study import Setup
from pocketllm.studies.style import mean_spread
from tests import tiny

SIZES: dict[Any, dict[str, Any]] = {
    rln: {"_SIZE": 16, "_QUICK_EPOCHS": 1},
    depth: {"_SIZE": 16, "_QUICK_EPOCHS": 1},
    utilization: {"_QUICK_SIZE": 16, "_QUICK_EPOCHS": 2},
    overfit: {
        "QUICK_CURVES": ((8, 16),),
        "_QUICK_EPOCHS": 1,
        "QUICK_SWEEP": ((4, 16), (2, 16), (1, 16), (1, 1024)),
        "QUICK_TWINS": ((4, 16), (2, 16)),
    },
    codebook: {"QUICK_GRID": ((1, 2), (2, 4), (4, 8), (4, 4)), "QUICK_MODELS": ((1, 2), (2, 4))},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    sizes = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 96, "max_position_embeddings": 512}
    return str(tiny.save(tmp_path_factory.mktemp("codec-studies") / "dense", **sizes))


@pytest.fixture(scope="module")
def done(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every study, run once in its small version: name -> outcome."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("POCKETLLM_DATA", raising=False)
        for module, sizes in SIZES.items():
            for name, value in sizes.items():
                patch.setattr(module, name, value)
        folder = tmp_path_factory.mktemp("out")
        return {
            module.STUDY.name: run_study(module.STUDY.name, model, folder / module.STUDY.name, quick=True)
            for module in SIZES
        }


def results_of(done: dict[str, Any], module: Any) -> dict[str, Any]:
    """A copy to change."""
    return copy.deepcopy(done[module.STUDY.name].result["results"])


def setup_of(model: str, quick: bool = True) -> Setup:
    return Setup(model, quick, 0, "cpu", None, Path("unused"))


@pytest.mark.parametrize("module", SIZES)
def test_writes_page_and_pictures(done: dict[str, Any], module: Any) -> None:
    outcome, name = done[module.STUDY.name], module.STUDY.name
    page = (outcome.output / f"{name}.md").read_text()
    assert all(sentence in page for sentence in outcome.result["findings"])
    assert all(table.title in page and table.rows for table in module.STUDY.tables(outcome.result["results"]))
    assert (outcome.output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    drawn = (outcome.output / f"{name}.svg").read_text()
    assert "</svg>" in drawn and "mathdefault" not in drawn
    json.dumps(outcome.result, allow_nan=False)


@pytest.mark.parametrize("module", SIZES)
def test_the_full_version_is_larger(model: str, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        trials, "_check_size", lambda *sizes: None
    )  # its codebooks are too large for this model
    small, full = ([s.key for s in module.STUDY.steps(setup_of(model, quick))] for quick in (True, False))
    assert len(set(full)) == len(full)
    assert len(full) > len(small) or module is utilization


def test_models_that_cannot_be_studied(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        SourceError, match=r"have 20 subvectors of 8 weights, wanted at least K = 32; study a larger"
    ):
        trials.train(torch.randn(10, 16), trials.OURS, 32, 0)
    dense = CompressConfig(overrides=(("*", 16.0),))
    monkeypatch.setattr(trials, "CompressConfig", lambda: dense)
    with pytest.raises(SourceError, match="has no linear layer in its blocks"):
        trials.middle_kinds(setup_of(model))


# trials


def test_a_sample_is_whole_rows_of_the_middle_block(model: str) -> None:
    setup = setup_of(model)
    up = trials.up_projection(setup)
    assert up.name == "model.layers.1.mlp.up_proj.weight"
    weight = setup.source().read(up.name).float()
    whole, part = trials.sample(setup, up, 1 << 20), trials.sample(setup, up, 640)
    assert whole.whole and torch.equal(whole.weight, weight)
    assert part.weight.shape == (10, 64) and not part.whole
    assert all(any(torch.equal(row, other) for other in weight) for row in part.weight)
    assert whole.facts()["mean_square"] == pytest.approx(float(weight.square().mean()))
    kinds = [m.kind for m in trials.middle_kinds(setup)]
    assert len(kinds) == len(set(kinds)) == 7


def test_stored_bits_are_those_of_compress(model: str) -> None:
    """At codebook and decoder per matrix the report says the same for a matrix."""
    config = CompressConfig(vector_len=4, codebook_size=16, codebook_scope="matrix", decoder_scope="matrix")
    report = pocketllm.dry_run(model, config)
    for name in ("model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.k_proj.weight"):
        weight = setup_of(model).source().read(name)
        bits = trials.stored_bits(weight, config.codec_for(4), 16)
        (found,) = [m for m in report.matrices if m.name == name]
        assert sum(bits.values()) / weight.numel() == pytest.approx(found.bpw, abs=1e-5)


def test_a_trial_measures_what_is_stored(model: str) -> None:
    weight = setup_of(model).source().read("model.layers.1.mlp.up_proj.weight").float()
    trial = trials.train(weight, CodecConfig(epochs=2, batch_size=256), 16, 0)
    assert torch.equal(trial.codec.codebook, trial.codec.codebook.half().float())
    decoded = trial.codec.decode(trial.codec.encode(weight))
    assert trial.mse == pytest.approx(float((weight - decoded).square().mean()))
    assert trial.nmse == pytest.approx(trial.mse / float(weight.square().mean()))
    assert int(trial.counts.sum()) == weight.numel() // 4
    assert [int(c.sum()) for c in trial.epoch_counts] == [weight.numel() // 4] * 2
    broken = dataclasses.replace(trial, curve=trial.curve[:1])
    assert trial.end == trial.curve[-1] and broken.end == math.inf


def test_long_series_in_bins() -> None:
    assert trials.binned([1, 3, 5, 7, 9], 2) == [2, 7]
    assert trials.binned([1, 3, 5, 7, 9], 2, highest=True) == [3, 9]
    assert trials.binned([1.0], 40) == [1.0] and trials.binned([], 4) == []
    assert trials.digits(0.123456789) == 0.12346 and trials.digits(math.inf) == math.inf


def test_spread_is_told_of_several_values_only() -> None:
    assert mean_spread([1.0, 2.0, 3.0]) == "2.00 ± 1.0"
    assert mean_spread([0.5]) == "0.500"
    assert mean_spread([1.0, None]) == "1.00 (1 not finite)" and mean_spread([None]) == "not finite"


def test_a_difference_is_held_against_its_noise() -> None:
    gap = noise.between([1.0, 1.2], [0.8, 1.0])
    assert gap is not None and gap.value == pytest.approx(0.2) and gap.error == pytest.approx(0.02**0.5)
    assert not gap.clear and gap.verdict == "within two standard errors (0.28)"
    assert noise.apart(1.0, 0.03, 0.8, 0.04).clear and not noise.apart(1.0, 0.03, 0.91, 0.04).clear
    unknown = noise.apart(1.0, None, 0.0, 0.1)
    assert not unknown.clear and unknown.verdict == "of unknown standard error"
    assert noise.between([1.0], [0.5]) == noise.Difference(0.5, math.inf)
    assert noise.between([None, 1.0], [0.5, 0.5]) is None


# rln


def test_rln_has_every_norm_kind_and_training(done: dict[str, Any]) -> None:
    results = results_of(done, rln)
    kinds = [key.split(".", 2)[2] for key in results if key.startswith("published.rln.")]
    assert len(kinds) == 3
    for training in rln.TRAININGS:
        for norm in rln.NORMS:
            assert [key for key in results if key.startswith(f"{training}.{norm}.")] == [
                f"{training}.{norm}.{kind}" for kind in kinds
            ]
    entry = results[f"published.ln.{kinds[0]}"]
    assert entry["settings"]["norm"] == "ln" and entry["settings"]["learning_rate"] == 1.6e-2
    assert entry["settings"]["max_grad_norm"] is None  # infinite: not cut
    assert entry["gradient"]["high"][0] >= entry["gradient"]["low"][0] > 0
    assert entry["peak_gradient"][0] == max(entry["peak_gradient"][0], entry["last_gradient"][0])


def test_rln_says_what_exploded(done: dict[str, Any]) -> None:
    results = results_of(done, rln)
    entries = [value for key, value in results.items() if key.startswith("published.ln.")]
    for entry in entries:
        entry["peak_gradient"] = [11 * first for first in entry["first_gradient"]]
    assert exploded(entries) == (6, 6)
    for key, entry in results.items():
        if key.startswith("published.rln."):
            entry["peak_gradient"] = entry["first_gradient"]
        entry["end_nmse"] = [0.4, 0.5]
    for key, entry in results.items():
        if key.startswith("published.ln."):
            entry["end_nmse"] = [0.4, 0.6]
    assert rln.findings(results)[0].startswith("Held in part: ")
    assert "LayerNorm ends 0.050 higher than RLN, within two standard errors" in rln.findings(results)[0]
    assert "6 of 6 with LayerNorm" in rln.findings(results)[0]
    for entry in entries:
        entry["peak_gradient"] = entry["first_gradient"]
    assert rln.findings(results)[0].startswith("Did not hold here: ")
    for entry in entries:
        entry["end_nmse"] = [0.6, 0.7]
    assert "0.20 higher than RLN, more than two" in rln.findings(results)[0]
    assert rln.findings(results)[0].startswith("Held in part: ")
    entries[0]["end_nmse"][0] = None
    assert exploded(entries) == (1, 6)


def test_rln_counts_where_it_is_better(done: dict[str, Any]) -> None:
    results = results_of(done, rln)
    for key, entry in results.items():
        entry["end_nmse"] = [0.1 if ".rln." in key else 0.2] * len(entry["end_nmse"])
    assert all("RLN ends below it in 6 of 6" in sentence for sentence in rln.findings(results)[1:4])


def test_rln_says_what_was_learned_and_nothing_of_noise(done: dict[str, Any]) -> None:
    from matplotlib.figure import Figure

    results = results_of(done, rln)
    for key, entry in results.items():
        entry["latent_nmse"] = [1.0, 1.0] if key == "rate.none.0.16" else [0.5, 1.0]
        entry["end_nmse"] = [0.4, 0.6] if ".ln." in key else [0.5, 0.5]
    found = rln.findings(results)
    zeros = found[-2].split("Those at which most trainings end no better than zeros: ")[1]
    assert zeros == "RLN at none up to 0.16; LayerNorm at none up to 0.16; no norm at 0.16."
    assert "none beyond noise at K = 16" in found[-1]
    results["size.ln.16"]["end_nmse"] = [0.3, 0.3]
    assert "LayerNorm at K = 16 (" in rln.findings(results)[-1]
    for norm in rln.NORMS:
        results[f"size.{norm}.16"]["end_nmse"] = [None, None]
    assert "none beyond noise at K = 16 (RLN not finite" in rln.findings(results)[-1]
    rln.draw(results, Figure())


# depth


def test_depth_finds_the_gap_and_what_closes_it(done: dict[str, Any]) -> None:
    results = results_of(done, depth)

    def ends(what: str, by_depth: dict[int, float]) -> None:
        for key, entry in results.items():
            if key.startswith(what):
                entry["end_nmse"] = [by_depth[int(key.split(".")[1])]] * len(entry["end_nmse"])

    ends("published", {1: 0.3, 3: 0.2, 5: 0.4})
    ends("hidden", {1: 0.3, 3: 0.2, 5: 0.4})
    ends("tuned", {1: 0.3, 3: 0.2, 5: 0.2})
    for depth_, end in ((3, 0.3), (5, 0.5)):
        results[f"tuned.{depth_}.1.0.016"]["end_nmse"] = [end, end]
    found = depth.findings(results)
    assert found[0].startswith("Held: ") and "held against one: one block ends 0.10 higher" in found[0]
    assert "five blocks end 0.20 higher" in found[3] and "it is one of optimization" in found[3]
    results["tuned.5.1.0.005"]["end_nmse"] = [0.38, 0.38]
    assert "do not close it" in depth.findings(results)[3]
    ends("published", {1: 0.3, 3: 0.2, 5: 0.2})
    assert depth.findings(results)[0].startswith("Held in part: ")
    ends("published", {1: 0.1, 3: 0.2, 5: 0.4})
    assert "right did not hold: one block ends 0.10 lower, more than two" in depth.findings(results)[0]
    ends("published", {1: 0.1, 3: 0.2, 5: 0.2})
    assert depth.findings(results)[0].startswith("Did not hold here: ")
    results["published.5"]["end_nmse"][0] = None
    assert "a training broke off" in depth.findings(results)[0]


def test_depth_says_nothing_of_what_noise_would_make(done: dict[str, Any]) -> None:
    results = results_of(done, depth)
    for key, entry in results.items():
        entry["end_nmse"] = [0.4, 0.8] if key.split(".")[1] == "5" else [0.4, 0.5]
    found = depth.findings(results)
    assert found[0].startswith("Did not hold here: ") and "within two standard errors" in found[0]
    assert "show no gap that could be closed" in found[3]
    for key in ("tuned.5.1.0.016", "tuned.3.1.0.016"):
        results[key]["end_nmse"] = [1.0, 1.0] if ".5." in key else [0.6, 0.6]
    assert "whether tuning closes it, these trainings cannot say" in depth.findings(results)[3]
    assert "the highest rate tried at that length" not in depth.findings(results)[3]
    results["tuned.3.1.0.016"]["end_nmse"] = [0.3, 0.3]
    assert "the highest rate tried at that length" in depth.findings(results)[3]


def test_depth_trains_what_it_says(done: dict[str, Any]) -> None:
    results = results_of(done, depth)
    for key, entry in results.items():
        assert entry["settings"]["depth"] == int(key.split(".")[1])
        assert entry["settings"]["init"] == ("kmeans" if key.startswith("ours") else "normal")
        assert math.isinf(entry["settings"]["max_grad_norm"] or math.inf) is key.startswith("published")
    assert {results[key]["settings"]["hidden"] for key in results if key.startswith("hidden")} == {16, 64}


# overfit


def test_overfit_knows_quantized_weights() -> None:
    levels = torch.arange(16.0)
    weight = levels[torch.randint(16, (8, 64), generator=torch.Generator().manual_seed(0))]
    assert 10 < overfit._levels(weight) <= 16
    assert overfit._levels(torch.randn(8, 64)) == 32


def test_overfit_knows_what_rounding_costs() -> None:
    weight = torch.randn(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))[None]
    measured = float((weight - weight.bfloat16().double()).square().mean())
    assert overfit._rounding(weight.float()) == pytest.approx(measured, rel=0.02)


def test_overfit_points_are_coded_as_they_say(done: dict[str, Any], model: str) -> None:
    results = results_of(done, overfit)
    for key in ("sweep.4x16", "sweep.1x16"):
        point = results[key]
        assert point["index_bpw"] == pytest.approx(math.log2(point["codebook_size"]) / point["vector_len"])
        assert point["bpw"] > point["index_bpw"] and point["bits"]["row_scales"] == 0
        assert point["bound_mse"] < point["mse"]
        assert point["mse"] == pytest.approx(point["kmeans_mse"], rel=0.2)
    assert results["sweep.1x1024"]["mse"] < 1e-2 * results["sweep.1x16"]["mse"]
    assert results["twin.4x16"]["mse"] > results["twin.4x16"]["bound_mse"]


def test_overfit_says_where_the_target_is_reached(done: dict[str, Any]) -> None:
    results = results_of(done, overfit)
    points = [value for key, value in results.items() if key.startswith("sweep.")]
    for point in points:
        point["mse"] = 1e-2
    assert overfit.STUDY.findings(results)[0].startswith("Did not hold here. ")
    points[0] |= {"mse": 1e-5, "bpw": 5.0, "index_bpw": 4.5}
    first = overfit.STUDY.findings(results)[0]
    assert (
        first.startswith("Held with enough codewords, not at the paper's 2 bits")
        and "from 4.50 bits" in first
    )
    points[0]["bpw"] = 1.9
    assert overfit.STUDY.findings(results)[0].startswith("Held. ")


def test_overfit_counts_all_bits_where_it_looks_at_the_bound(done: dict[str, Any]) -> None:
    results = results_of(done, overfit)
    for value in (value for key, value in results.items() if key.startswith("sweep.")):
        value |= {"mse": 1.0, "bound_mse": 0.5, "bpw": 2.0}
    bound, point = results["bound"], results["sweep.4x16"]
    bound |= {"bits": [1.0, 2.0, 3.0], "mse": [0.25, 0.0625, 0.015625], "distinct_values": 16}
    point |= {"mse": 0.1, "bound_mse": 0.2, "index_bpw": 1.0, "bpw": 1.5}
    words = " ".join(overfit.STUDY.findings(results))
    assert "All bits counted, 1 of 4 codes pass the bound" in words and "each of the 16 different" in words
    point["bpw"] = 2.5
    words = " ".join(overfit.STUDY.findings(results))
    assert "All bits counted, 0 of 4 codes pass the bound for Gaussian rows." in words
    assert "At the bits of the indices alone (d = 4, K = 16; 1.00 bits of indices, 2.50 in all)" in words
    row = next(r for r in overfit.STUDY.tables(results)[2].rows if r[:2] == ["4", "16"])
    assert row[-2:] == ["0.50", f"{0.1 / 2**-5:.2f}"]
    point["bpw"] = 5.0  # past the rates whose bound was kept
    row = next(r for r in overfit.STUDY.tables(results)[2].rows if r[:2] == ["4", "16"])
    assert row[-1] == f"{0.1 * 4**5:.2f}"


# codebook


def test_codebook_counts_every_bit(done: dict[str, Any]) -> None:
    results = results_of(done, codebook)
    point = results["grid.4x256"]
    weights = point["matrix"]["rows"] * point["matrix"]["columns"]
    assert point["shared_by"] == 2
    assert point["bpw_alone"] == pytest.approx(sum(point["bits"].values()) / weights)
    common = point["bits"]["codebook"] + point["bits"]["decoder"]
    assert point["bpw_alone"] - point["bpw_shared"] == pytest.approx(common / 2 / weights)
    assert point["nmse"] <= 1.001 * point["kmeans_nmse"]


def test_codebook_measures_whole_models(done: dict[str, Any]) -> None:
    results = results_of(done, codebook)
    dense, coded = results["model.dense"], results["model.2x16"]
    assert dense["text"] == coded["text"] == "Python's own documentation (held-out topics)"
    assert done["codebook"].result["config"]["texts"].keys() == {dense["text"]}
    assert coded["perplexity"] != dense["perplexity"] and coded["tokens"] == dense["tokens"]
    assert coded["bpw"] > 2 and 0 < coded["nmse"] < 1


def test_codebook_says_where_it_is_concise(done: dict[str, Any]) -> None:
    results = results_of(done, codebook)
    first = codebook.STUDY.findings(results)[0]
    assert first.startswith("Held at the paper's size, which is a matter of counting: ")
    assert "0.093 bits per weight beside 1.875 of indices, 1.97 with the row scales" in first
    assert "it did not hold, shared or not: at d = 4, K = 256" in first
    point = results["grid.4x256"]
    scales = 16 / point["matrix"]["columns"]
    point["bpw_shared"] = point["index_bpw"] + scales + 0.01
    assert "it held only where matrices share a codebook: " in codebook.STUDY.findings(results)[0]
    point["bpw_alone"] = point["bpw_shared"]
    assert "it held, too: " in codebook.STUDY.findings(results)[0]


# utilization


def test_utilization_counts_use(done: dict[str, Any]) -> None:
    results = results_of(done, utilization)
    entry = results["published"]
    assert list(entry["use_by_rank"]) == ["1", "2"] and entry["ranks"][0] == 1 and entry["ranks"][-1] == 16
    assert entry["coded_use_by_rank"] == sorted(entry["coded_use_by_rank"], reverse=True)
    assert results["ours"]["trained_used"][0] == 1.0
    assert results["collapse-norm"]["settings"]["norm"] == "none"
    assert results["revived"]["settings"]["revive"] and not entry["settings"]["revive"]


def test_utilization_by_rank() -> None:
    counts = torch.tensor([0, 6, 1, 1])
    assert utilization._by_rank(counts) == [3.0, 0.5, 0.5, 0.0]


def test_utilization_says_what_collapsed(done: dict[str, Any]) -> None:
    results = results_of(done, utilization)
    results["published"]["trained_used"] = [0.5]
    assert utilization.STUDY.findings(results)[0].startswith("Did not hold here, that the published")
    results["published"]["trained_used"] = [1.0]
    assert utilization.STUDY.findings(results)[0].startswith("Held here, that the published start")
    assert "two standard errors: none." in utilization.STUDY.findings(results)[1]  # of one training
    results["published"]["nmse"], results["ours"]["nmse"] = [0.4, 0.5], [0.2, 0.2]
    assert "two standard errors: k-means and identity." in utilization.STUDY.findings(results)[1]
    results["collapse-rate"]["trained_perplexity"] = [1.5]
    assert "collapsed in 1 of 1" in utilization.STUDY.findings(results)[3]
    results["collapse-rate"]["trained_perplexity"] = [8.0]
    assert "collapsed in 0 of 1" in utilization.STUDY.findings(results)[3]
