"""The planner: every tensor accounted for, exact bits, targets met from below."""

from __future__ import annotations

import math

import pytest
import torch

import pocketllm
from pocketllm.codec import predicted_nmse
from pocketllm.errors import ConfigError
from pocketllm.plan.bit_allocation import make_plan
from pocketllm.plan.matrices import Matrix
from pocketllm.plan.sizes import PlannedModel
from pocketllm.source.dense_checkpoint import DenseCheckpoint, open_dense
from tests import tiny


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> DenseCheckpoint:
    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 4, "head_dim": 32}
    return open_dense(tiny.save(tmp_path_factory.mktemp("plan") / "dense", **sizes))


@pytest.mark.parametrize("bits", [1.0, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("d", [1, 2, 4, 8])
def test_predicted_error_respects_rate_distortion(d: int, bits: float) -> None:
    """Above Shannon's bound for a Gaussian, and within 3 dB of it in one dimension."""
    bound = 2.0 ** (-2 * bits)
    assert bound < predicted_nmse(d, bits * d) < 3 * bound
    assert predicted_nmse(d, bits * d + 1) < predicted_nmse(d, bits * d)
    assert predicted_nmse(d + 1, bits * (d + 1)) < predicted_nmse(d, bits * d)


@pytest.mark.parametrize("bpw", [2.5, 4.0, 6.0])
def test_target_is_met_from_below(bpw: float, source: DenseCheckpoint) -> None:
    plan = make_plan(source, tiny.target(bpw))
    assert 0.9 * bpw < plan.bpw <= bpw


@pytest.mark.parametrize("scope", ["matrix", "kind", "model"])
def test_bits_are_those_of_the_tensors_written(scope: str, source: DenseCheckpoint) -> None:
    plan = make_plan(source, tiny.settings(codebook_scope=scope, decoder_scope="matrix"))
    sizes = PlannedModel(source, plan, "model").form.tensors
    dense = {entry.name for entry in plan.dense}
    stored = sum(
        8 * torch.Size(shape).numel() * dtype.itemsize
        for n, (dtype, shape) in sizes.items()
        if n not in dense
    )
    assert sum(plan.bits_by_part().values()) == stored
    assert sum(plan.matrix_bits().values()) == pytest.approx(stored)
    assert plan.bpw == pytest.approx(stored / plan.weights)


def test_every_tensor_is_compressed_or_has_a_reason(source: DenseCheckpoint) -> None:
    plan = make_plan(source, tiny.settings())
    coded, dense = {m.name for m in plan.matrices}, {d.name for d in plan.dense}
    assert coded | dense == set(source.names()) and not coded & dense
    assert source.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert "lm_head.weight" not in coded | dense


def test_blocks_and_embeddings_left_dense(source: DenseCheckpoint) -> None:
    plan = make_plan(source, tiny.settings(dense_first=1, dense_last=2, keep_embeddings=True))
    assert {m.name.split(".")[2] for m in plan.matrices} == {"1"}
    reasons = {d.name: d.reason for d in plan.dense}
    assert "embedding or head" in reasons["model.embed_tokens.weight"]
    assert "block" in reasons["model.layers.3.mlp.up_proj.weight"]


def test_embedding_is_coded_finer(source: DenseCheckpoint) -> None:
    plan = make_plan(source, tiny.target(3.0, embedding_extra_bits=1.0))
    assert plan.specs["model.embed_tokens.weight"].nmse < plan.specs["model.layers.1.mlp.up_proj.weight"].nmse


@pytest.mark.parametrize(("bpw", "bits"), [(0.001, 13), (15.9, 3)])
def test_unreachable_targets(bpw: float, bits: int, source: DenseCheckpoint) -> None:
    with pytest.raises(ConfigError, match=r"target_bpw: .* the possible range is \d"):
        make_plan(source, tiny.target(bpw, max_index_bits=bits))


def test_impossible_settings(source: DenseCheckpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="leave none of the model's 4 blocks"):
        make_plan(source, tiny.settings(dense_first=2, dense_last=2))
    with pytest.raises(ConfigError, match="codebook_size: got 1048576"):
        make_plan(source, tiny.settings(codebook_size=1 << 20))
    monkeypatch.setattr(Matrix, "own_bits", lambda self, spec, row_scale: 32 * self.weights)
    with pytest.raises(ConfigError, match="no tensor is left to compress"):
        make_plan(source, tiny.settings())


def test_vector_len_that_a_trellis_does_not_offer(source: DenseCheckpoint) -> None:
    with pytest.raises(
        ConfigError, match=r"vector_len: no codec has 3 weights per index with trellis_width=6"
    ):
        make_plan(source, tiny.on_trellis(vector_len=3))
    assert {
        spec.vector_len for spec in make_plan(source, tiny.on_trellis(vector_len=1, bpw=6.0)).specs.values()
    } == {1}


@pytest.mark.parametrize("importance", [None, {"mlp.up_proj": 100.0}])
def test_bits_go_where_errors_cost_most(importance: dict[str, float] | None, source: DenseCheckpoint) -> None:
    cost = {
        n: (importance or {}).get(n.partition("layers.1.")[2].removesuffix(".weight"), 1.0)
        for n in source.names()
    }
    plan = make_plan(source, tiny.on_trellis(4.0), cost if importance else None)
    bits = {name: spec.index_bpw for name, spec in plan.specs.items()}
    assert 0.95 * 4.0 < plan.bpw <= 4.0
    assert (bits["model.layers.1.mlp.up_proj.weight"] > bits["model.layers.2.mlp.up_proj.weight"]) == bool(
        importance
    )


def test_blocks_left_dense_count_in_their_bits(source: DenseCheckpoint) -> None:
    one, all_of_them = (pocketllm.dry_run(source.folder, tiny.settings(dense_first=n)) for n in (1, 0))
    assert one.bpw_blocks == pytest.approx(
        (32 + 3 * _blocks_only(one)) / 4, rel=1e-4
    )  # one of four, in float32
    assert all_of_them.bpw_blocks == pytest.approx(_blocks_only(all_of_them), rel=1e-4)


def _blocks_only(report: pocketllm.Report) -> float:
    """Bits per weight of the compressed matrices of blocks."""
    inside = [(math.prod(m.shape), m.bpw) for m in report.matrices if ".layers." in m.name]
    return sum(count * bits for count, bits in inside) / sum(count for count, _ in inside)
