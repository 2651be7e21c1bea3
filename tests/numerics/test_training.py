"""Training never ends worse than it began, for every form, and is deterministic."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketllm.codec.codebook import kmeans_codebook, nearest
from pocketllm.codec.index_form import Independent
from pocketllm.codec.matrix_codec import MatrixCodec
from pocketllm.codec.normalization import TypicalRow, divide_rows, reshaped_layer_norm, row_rms
from pocketllm.codec.subvectors import cut, join
from pocketllm.codec.training import TrainingStep, fit
from pocketllm.config import CodecConfig, Safeguards
from pocketllm.errors import ConfigError

QUICK: dict[str, Any] = {"epochs": 2, "kmeans_iterations": 5, "batch_size": 1024}


def sample(rows: int = 96, columns: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator)


@pytest.mark.parametrize("decoder", ["row", "lookup"])
@pytest.mark.parametrize("norm", ["rln", "ln", "none"])
@pytest.mark.parametrize("loss", ["mse", "rmse"])
def test_training_never_makes_it_worse(decoder: str, norm: str, loss: str) -> None:
    config = CodecConfig(decoder=decoder, norm=norm, loss=loss, commitment_weight=0.25, **QUICK)
    result = fit({"a": [sample()], "b": [sample(32, 40), sample(16, 20)]}, config, Independent(64), seed=0)
    assert all(result.final_nmse[key] <= result.start_nmse[key] < 1 for key in ("a", "b"))
    assert result.utilization == 1.0
    assert len(result.curve) == 2 and all(math.isfinite(value) for value in result.curve)
    assert result.codecs["a"].codebook is result.codecs["b"].codebook


def test_training_improves_on_k_means() -> None:
    result = fit({"a": [sample(256)]}, CodecConfig(**{**QUICK, "epochs": 6}), Independent(64), seed=0)
    assert result.final_nmse["a"] < 0.9999 * result.start_nmse["a"]


@pytest.mark.parametrize("decoder", ["row", "lookup"])
def test_at_most_k_means_error(decoder: str) -> None:
    """At equal K and d, on row-scaled subvectors, against faiss's k-means of the same rounds."""
    weight = sample(256, 64)
    unit = divide_rows(weight, row_rms(weight))
    points = cut(unit, 4).reshape(-1, 4)
    table = kmeans_codebook(points, 128, 10, seed=3)
    floor = float((table[nearest(points, table)] - points).square().sum() / points.square().sum())
    config = CodecConfig(decoder=decoder, **{**QUICK, "kmeans_iterations": 10})
    codec = fit({"a": [weight]}, config, Independent(128), seed=3).codecs["a"]
    decoded = divide_rows(codec.decode(codec.encode(weight)), row_rms(weight))
    assert float((decoded - unit).square().sum() / unit.square().sum()) <= floor


def test_the_published_start_trains() -> None:
    config = CodecConfig(decoder="row", init="normal", **{**QUICK, "epochs": 10, "learning_rate": 1.6e-2})
    result = fit({"a": [sample(256)]}, config, Independent(64), seed=0)
    assert result.final_nmse["a"] < 0.7 * result.start_nmse["a"]


@pytest.mark.parametrize("init", ["kmeans", "normal"])
def test_same_seed_same_codec(init: str) -> None:
    config = CodecConfig(init=init, **QUICK)
    states = [
        fit({"a": [sample()]}, config, Independent(32), seed).codecs["a"].state_dict() for seed in (5, 5, 6)
    ]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert not all(torch.equal(states[0][key], states[2][key]) for key in states[0])


def test_dead_codewords_are_revived() -> None:
    """Random codewords far from random latents: most are dead at first."""
    config = CodecConfig(init="normal", **{**QUICK, "epochs": 8})
    result = fit({"a": [sample(256)]}, config, Independent(256), seed=0)
    assert result.revived > 0


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_constant_sample(value: float) -> None:
    weight = torch.full((8, 32), value)
    codec = fit({"a": [weight]}, CodecConfig(**QUICK), Independent(4), seed=0).codecs["a"]
    assert torch.allclose(codec.decode(codec.encode(weight)), weight, rtol=0.01)


def test_as_many_codewords_as_subvectors() -> None:
    result = fit({"a": [sample(4, 16)]}, CodecConfig(**QUICK), Independent(16), seed=0)
    assert result.final_nmse["a"] < 1e-6


def codec(**changes: Any) -> MatrixCodec:
    config = CodecConfig(**changes)
    made = MatrixCodec(config, nn.Parameter(torch.randn(16, config.vector_len)))
    for net in (made.encoder, made.decoder):
        net.reset("random", torch.Generator().manual_seed(0))
    return made


@pytest.mark.parametrize("columns", [1, 3, 4, 30])
@pytest.mark.parametrize("row_scale", [True, False])
def test_look_up_decoding_is_a_table(columns: int, row_scale: bool) -> None:
    made = codec(row_scale=row_scale)
    weight = sample(7, columns)
    encoded = made.encode(weight)
    indices = encoded.indices(4)
    assert indices.shape == (7, -(-columns // 4)) and encoded.row_scale.dtype == torch.bfloat16
    table = made.decoded_codebook()
    expected = join(table[indices], columns) * encoded.row_scale.float()[:, None]
    assert torch.equal(made.decode(encoded), expected)
    if not row_scale:
        assert torch.equal(encoded.row_scale, torch.ones(7, dtype=torch.bfloat16))


@pytest.mark.parametrize("decoder", ["row", "lookup"])
def test_large_matrices_are_coded_in_chunks(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from pocketllm.codec import matrix_codec

    made = codec(decoder=decoder, norm="ln")
    weight = sample(20, 12)
    whole = made.encode(weight)
    monkeypatch.setattr(matrix_codec, "_CHUNK_WEIGHTS", 36)
    parts = made.encode(weight)
    assert torch.equal(whole.indices(4), parts.indices(4)) and torch.equal(whole.row_scale, parts.row_scale)
    assert torch.allclose(made.decode(parts), made.decode(whole), atol=1e-6)


def test_row_form_chooses_the_better_of_two() -> None:
    """No row is coded worse than by nearest latents alone."""
    made = codec(decoder="row")
    unit = cut(divide_rows(sample(), row_rms(sample())), 4)
    by_latent = nearest(made.encoder(unit).reshape(-1, 4), made.codebook).reshape(unit.shape[:2])
    chosen = made.choose(unit)
    errors = [(made.decode_unit(i, None) - unit).square().sum(dim=(1, 2)) for i in (by_latent, chosen)]
    assert (errors[1] <= errors[0]).all() and (errors[1] < errors[0]).any()


def test_a_typical_row_normalizes_as_rln_where_rows_are_alike() -> None:
    rows = torch.randn(1, 500, 4)
    typical = TypicalRow()
    assert torch.equal(typical.record(rows), reshaped_layer_norm(rows))
    assert torch.allclose(typical.replay(rows), reshaped_layer_norm(rows), atol=1e-6)


def test_an_observer_sees_every_step_and_changes_nothing() -> None:
    seen: list[TrainingStep] = []
    config = CodecConfig(**QUICK)
    watched = fit({"a": [sample()]}, config, Independent(64), seed=0, observer=seen.append)
    alone = fit({"a": [sample()]}, config, Independent(64), seed=0)
    assert watched.facts() == alone.facts()
    subvectors, batches = 96 * 16, 2
    assert [step.epoch for step in seen] == [0] * batches + [1] * batches
    assert sum(int(step.counts.sum()) for step in seen) == 2 * subvectors
    assert all(step.grad_norm > 0 and step.loss >= step.reconstruction * 0.9 > 0 for step in seen)


def test_gradients_are_cut_unless_told_otherwise() -> None:
    """The observed norm is that before it is cut, so that the first step's is the same."""
    config = CodecConfig(decoder="row", init="normal", **QUICK)
    seen: dict[float, list[TrainingStep]] = {1.0: [], math.inf: []}
    ends = []
    for most, steps in seen.items():
        guards = Safeguards(max_grad_norm=most, revive=False)
        ends.append(
            fit(
                {"a": [sample()]}, config, Independent(64), 0, safeguards=guards, observer=steps.append
            ).curve[-1]
        )
    assert seen[1.0][0].grad_norm == seen[math.inf][0].grad_norm > 1
    assert ends[0] != ends[1]


def test_dead_codewords_are_left_where_they_are_if_told_so() -> None:
    config = CodecConfig(decoder="row", init="normal", **QUICK)
    moved = [
        fit({"a": [sample()]}, config, Independent(128), 0, safeguards=Safeguards(revive=r)).revived
        for r in (True, False)
    ]
    assert moved[0] > 0 == moved[1]


def test_training_that_diverges_ends_with_the_best_state() -> None:
    config = CodecConfig(decoder="row", norm="none", init="normal", learning_rate=1e12, **QUICK)
    result = fit({"a": [sample()]}, config, Independent(64), 0, safeguards=Safeguards(math.inf, revive=False))
    assert len(result.curve) < config.epochs
    assert math.isfinite(result.final_nmse["a"]) and result.final_nmse["a"] <= result.start_nmse["a"]
    assert all(bool(torch.isfinite(p).all()) for p in result.codecs["a"].parameters())


def test_safeguards_that_mean_nothing() -> None:
    with pytest.raises(ConfigError, match="max_grad_norm: got 0"):
        Safeguards(max_grad_norm=0)
    with pytest.raises(ConfigError, match="max_grad_norm: got nan"):
        Safeguards(max_grad_norm=math.nan)
    assert Safeguards(max_grad_norm=math.inf).revive  # gradients as they are
