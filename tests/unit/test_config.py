"""Settings are checked when they are made, and survive JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

import pocketllm
from pocketllm import CodecConfig, CompressConfig
from pocketllm.config import CalibrationConfig, EvalConfig
from pocketllm.config.checks import flat
from pocketllm.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"norm": "batch"}, "norm: got 'batch', wanted one of rln, ln, none"),
        ({"decoder": "big"}, "decoder"),
        ({"init": "zeros"}, "init"),
        ({"loss": "l1"}, "loss"),
        ({"vector_len": 0}, "vector_len"),
        ({"hidden": -1}, "hidden"),
        ({"depth": -1}, "depth"),
        ({"hidden": 10**9}, "hidden: got 1000000000, wanted 0 to 16384"),
        ({"depth": 10**9}, "depth: got 1000000000, wanted 0 to 256"),
        ({"depth": 0, "decoder": "row"}, "depth=0 needs decoder='lookup'"),
        ({"depth": 0, "vq_weight": 0.0}, "vq_weight above 0"),
        ({"batch_size": 0}, "batch_size"),
        ({"epochs": -1}, "epochs"),
        ({"vq_weight": -0.1}, "vq_weight"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"vector_len": 9, "hidden": 16}, "hidden: got 16, wanted at least 18"),
        ({"codebook_source": "seed"}, "codebook_source='seed' needs a trellis"),
        ({"codebook_source": "hashed"}, "codebook_source='hashed' needs a trellis"),
        ({"codebook_source": "hashed", "trellis_width": 8}, "trellis_width: got 8, wanted 9 to 16"),
    ],
)
def test_codec_settings_are_checked(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CodecConfig(**values)


HASHED = CodecConfig(trellis_width=12, codebook_source="hashed")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"codebook_scope": "layer"}, "codebook_scope"),
        ({"decoder_scope": "auto"}, "decoder_scope"),
        ({"dense_first": -1}, "dense_first"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed: got 4294967296, wanted 0 to 4294967295"),
        ({"max_index_bits": 0}, "max_index_bits"),
        ({"max_index_bits": 21}, "max_index_bits"),
        ({"vector_len": 65}, "vector_len"),
        ({"vector_len": 4, "codebook_size": 1}, "codebook_size"),
        ({"vector_len": 3, "codec": HASHED}, "vector_len: got 3, wanted 1, 2 or none"),
        ({"codebook_size": 16}, "without vector_len"),
        ({"target_bpw": None}, "got no target"),
        ({"target_bytes": 100}, "got target_bpw and target_bytes"),
        ({"target_bpw": None, "target_bytes": 0}, "target_bytes"),
        ({"target_bpw": None, "target_ratio": 1.0}, "target_ratio"),
        ({"target_bpw": 0.0}, "target_bpw"),
        ({"target_bpw": 17.0}, "target_bpw"),
        ({"target_bpw": float("nan")}, "target_bpw"),
    ],
)
def test_settings_are_checked(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CompressConfig(**values)


@pytest.mark.parametrize("name", pocketllm.PRESETS)
def test_presets_survive_json(name: str) -> None:
    config = pocketllm.preset(name)
    assert CompressConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_presets_are_at_the_paper_s_sizes() -> None:
    sizes = {"paper-8x": 3.98, "paper-10x": 2.98, "paper-16x": 2.02, "paper-20x": 1.6}
    for name, bpw in sizes.items():
        config = pocketllm.preset(name)
        assert config.target_bpw == bpw
        assert (config.dense_first, config.dense_last) == (3, 2)
        assert (config.codec.decoder, config.codec.norm) == ("row", "rln")
        assert (config.codec.hidden, config.codec.depth, config.codec.vq_weight) == (16, 3, 0.5)


@pytest.mark.parametrize(
    ("name", "bpw", "vector_len"),
    [("paper-8x", 3.98, 3), ("paper-10x", 2.98, 4), ("paper-16x", 2.02, 8), ("paper-20x", 1.6, 8)],
)
def test_the_paper_s_presets_stay_as_they_are(name: str, bpw: float, vector_len: int) -> None:
    """Every field, so that a default which changes for the sake of other presets does not change these."""
    codec = {
        "vector_len": 4,
        "hidden": 16,
        "depth": 3,
        "norm": "rln",
        "decoder": "row",
        "row_scale": True,
        "init": "kmeans",
        "loss": "mse",
        "vq_weight": 0.5,
        "commitment_weight": 0.0,
        "epochs": 2,
        "learning_rate": 3e-3,
        "batch_size": 16384,
        "kmeans_iterations": 10,
        "sample_per_codeword": 256,
        "max_sample": 1 << 21,
        "trellis_width": None,
        "codebook_source": "fit",
    }
    assert pocketllm.preset(name).to_dict() == {
        "codec": codec,
        "target_bpw": bpw,
        "target_bytes": None,
        "target_ratio": None,
        "vector_len": vector_len,
        "codebook_size": None,
        "codebook_scope": "auto",
        "decoder_scope": "kind",
        "dense_first": 3,
        "dense_last": 2,
        "keep_embeddings": False,
        "embedding_extra_bits": 0.5,
        "max_index_bits": 15,
        "calibration": None,
        "overrides": [],
        "seed": 0,
    }


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"tokens": 100}, "tokens: got 100, wanted at least 512"),
        ({"context": 1, "tokens": 1}, "context: got 1, wanted at least 2"),
        ({"passes": -1}, "passes"),
        ({"refine_epochs": -1}, "refine_epochs"),
        ({"refine_rate": 0.0}, "refine_rate"),
        ({"compensate": -1}, "compensate: got -1, wanted at least 0"),
        ({"compensate_rate": 0.0}, "compensate_rate: got 0.0, wanted more than 0"),
        ({"compensate": 1, "sequential": False}, "compensate: got sequential=false, wanted true"),
        ({"damping": 0.0}, "damping"),
    ],
)
def test_calibration_settings_are_checked(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        CalibrationConfig(**values)


def test_settings_of_compensation_are_stored_only_with_it() -> None:
    """So that models without it keep their bytes."""
    off = CompressConfig(target_bpw=3, calibration=CalibrationConfig())
    on = CompressConfig(target_bpw=3, calibration=CalibrationConfig(compensate=5))
    more = {"compensate": 5, "compensate_rate": 1.0}
    assert on.to_dict()["calibration"] == {**off.to_dict()["calibration"], **more}
    assert "compensate" not in off.to_dict()["calibration"]
    assert CompressConfig.from_dict(off.to_dict()) == off and CompressConfig.from_dict(on.to_dict()) == on


def test_calibration_needs_the_look_up_decoder() -> None:
    with pytest.raises(
        ConfigError, match=r"calibration: got codec.decoder='row', codec.row_scale=True, wanted 'look"
    ):
        CompressConfig(codec=CodecConfig(decoder="row"), target_bpw=3, calibration=CalibrationConfig())


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match="unknown preset 'big'"):
        pocketllm.preset("big")
    with pytest.raises(ConfigError, match="unknown setting 'colour'"):
        CompressConfig.from_dict({**CompressConfig().to_dict(), "colour": 1})
    with pytest.raises(AttributeError, match="pocketllm attribute colour"):
        _ = pocketllm.colour  # type: ignore[attr-defined]


def test_hidden_grows_with_vector_len() -> None:
    assert CompressConfig().codec_for(16).hidden == 32
    assert CompressConfig().codec_for(2).hidden == 16


@pytest.mark.parametrize("name", ["context", "windows", "limit", "batch_tokens", "max_length"])
def test_evaluation_settings_are_checked(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: got 0, wanted at least"):
        EvalConfig(**{name: 0})


def test_settings_within_settings_are_named_by_their_path() -> None:
    assert flat({"a": 1, "b": {"c": (2,), "d": {"e": None}}}) == {"a": 1, "b.c": (2,), "b.d.e": None}


@pytest.mark.parametrize("name", pocketllm.PRESETS)
def test_calibrated_presets_are_on_a_hashed_trellis(name: str) -> None:
    codec = pocketllm.preset(name).codec
    assert codec.hashed == name.startswith("calibrated") == (codec.trellis_width is not None)
