"""Training on one matrix, as the studies of the codec do it; means, spreads and differences."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
import torch

import pocketllm
from pocketllm.config import CodecConfig, CompressConfig
from pocketllm.errors import SourceError
from pocketllm.studies.measure import significance, trials
from pocketllm.studies.show.numbers import mean_spread, noise
from tests.studies import setup_of, small_codec_model

WORK = Path("unused")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_codec_model(tmp_path_factory)


def test_models_that_cannot_be_studied(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        SourceError, match=r"have 20 subvectors of 8 weights, wanted at least K = 32; study a larger"
    ):
        trials.train(torch.randn(10, 16), trials.Training(trials.OURS, 32), 0)
    dense = CompressConfig(overrides=(("*", 16.0),))
    monkeypatch.setattr(trials, "CompressConfig", lambda: dense)
    with pytest.raises(SourceError, match="has no linear layer in its blocks"):
        trials.middle_kinds(setup_of(model, WORK))


def test_a_sample_is_whole_rows_of_the_middle_block(model: str) -> None:
    setup = setup_of(model, WORK)
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
        weight = setup_of(model, WORK).source().read(name)
        bits = trials.stored_bits(weight, config.codec_for(4), 16)
        (found,) = [m for m in report.matrices if m.name == name]
        assert sum(bits.values()) / weight.numel() == pytest.approx(found.bpw, abs=1e-5)


def test_a_trial_measures_what_is_stored(model: str) -> None:
    weight = setup_of(model, WORK).source().read("model.layers.1.mlp.up_proj.weight").float()
    trial = trials.train(weight, trials.Training(CodecConfig(epochs=2, batch_size=256), 16), 0)
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
    """Two pairs leave one degree of freedom, for which the 95 % interval is ± 12.7 standard errors."""
    gap = significance.by_seed([1.0, 1.2], [0.8, 0.9])
    assert gap is not None and gap.value == pytest.approx(0.25) and gap.error == pytest.approx(0.05)
    assert gap.margin == pytest.approx(12.706 * 0.05) and not gap.clear
    assert noise(gap) == "within noise (± 0.64 at 95 %)"
    assert significance.Difference(0.2, 0.1).margin == pytest.approx(
        0.198
    )  # very many: 1.96, or a little more
    assert noise(significance.Difference(0.2, 0.1, 7)) == "within noise (± 0.24 at 95 %)"
    assert noise(significance.Difference(-0.3, 0.1, 7)) == "beyond noise (± 0.24 at 95 %)"
    assert significance.Difference(0.2, 0.1, 13).margin == significance.Difference(0.2, 0.1, 12).margin
    unknown = significance.paired([1.0], [0.5])
    assert unknown == significance.Difference(0.5, math.inf, 0) and not unknown.clear and not unknown.known
    assert noise(unknown) == "of one measurement each, so that noise is not known"
    assert significance.Difference(2.0, 0.5, 3).times(-2) == significance.Difference(-4.0, 1.0, 3)
    assert (
        significance.by_seed([None, 1.0], [0.5, 0.5]) is None and significance.by_seed([1.0], [None]) is None
    )


def test_quantiles_are_those_of_students_t() -> None:
    """Against the integral of the density."""
    for freedom, quantile in significance._QUANTILES.items():
        scale = math.gamma((freedom + 1) / 2) / math.sqrt(freedom * math.pi) / math.gamma(freedom / 2)
        x = torch.linspace(0, quantile, 20001, dtype=torch.float64)
        share = torch.trapezoid(scale * (1 + x * x / freedom) ** (-(freedom + 1) / 2), x)
        assert 2 * float(share) == pytest.approx(significance.CONFIDENCE, abs=2e-4)
