"""The command in a report makes the same configuration again: settings, options, parser, settings."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from typing import Any

import pytest

import pocketllm
from pocketllm import cli
from pocketllm.config import (
    DEFAULT_PRESET,
    PRESETS,
    CalibrationConfig,
    CompressConfig,
    DistillConfig,
    LoopConfig,
    LoraTuneConfig,
    as_options,
    finetune_as_options,
    preset,
)
from pocketllm.config.command import Command, adapter_command, command_for

BASE = preset(DEFAULT_PRESET)
PLAIN = preset("lookup-8x")


class CaughtError(Exception):
    """Carries the configuration out of the command."""

    def __init__(self, config: Any) -> None:
        self.config = config


def parsed(command: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The configuration that the command line makes of a command."""

    def caught(model: Any, config: Any, *more: Any, **how: Any) -> None:
        raise CaughtError(config)

    monkeypatch.setattr(pocketllm, "dry_run", caught, raising=False)
    monkeypatch.setattr("pocketllm.recover.dry_run_lora", caught)
    monkeypatch.setattr("pocketllm.recover.dry_run_distill", caught)
    monkeypatch.setattr(sys, "argv", [*shlex.split(command), "--dry-run"])
    with pytest.raises(CaughtError) as found:
        cli.main()
    return found.value.config


def with_codec(base: CompressConfig = PLAIN, **changes: Any) -> CompressConfig:
    return dataclasses.replace(base, codec=dataclasses.replace(base.codec, **changes))


def with_calibration(**changes: Any) -> CompressConfig:
    assert BASE.calibration is not None
    return dataclasses.replace(BASE, calibration=dataclasses.replace(BASE.calibration, **changes))


CONFIGS = {
    **{name: entry.config for name, entry in PRESETS.items()},
    "bpw": dataclasses.replace(BASE, target_bpw=2.5),
    "ratio": dataclasses.replace(BASE, target_bpw=None, target_ratio=6.5),
    "size": dataclasses.replace(BASE, target_bpw=None, target_bytes=30_000_000),
    "fixed sizes": dataclasses.replace(PLAIN, vector_len=5, codebook_size=32),
    "scopes": dataclasses.replace(BASE, codebook_scope="kind", decoder_scope="matrix"),
    "blocks": dataclasses.replace(BASE, dense_first=1, dense_last=2, keep_embeddings=True, seed=7),
    "codec": with_codec(norm="ln", loss="rmse", hidden=24, depth=2, vq_weight=0.25, commitment_weight=0.1),
    "training": with_codec(epochs=9, learning_rate=1e-4, batch_size=512, init="normal"),
    "no row scale": with_codec(decoder="row", row_scale=False),
    "paper, changed": dataclasses.replace(preset("paper-16x"), dense_first=0, seed=3),
    "calibrated": dataclasses.replace(PLAIN, calibration=CalibrationConfig()),
    "calibrated on texts": dataclasses.replace(
        BASE, target_bpw=3.0, calibration=CalibrationConfig(tokens=4096, texts=("a b.txt", "c"))
    ),
    "overrides": dataclasses.replace(
        BASE, target_bpw=2.5, overrides=(("*.down_proj.*", 4.0), ("model.layers.0.*", 16), ("a=b", 2.55))
    ),
    "not rotated": with_calibration(rotate=False),
    "not in sequence": with_calibration(sequential=False),
    "passes": with_calibration(passes=3, two_sided=False),
    "one-sided": with_calibration(two_sided=False),
    "all tokens alike": with_calibration(weigh_tokens=False),
    "refined": with_calibration(refine_epochs=2),
    "calibrated plain codec, refined": dataclasses.replace(
        PLAIN,
        calibration=CalibrationConfig(refine_epochs=2, passes=1, two_sided=False, rotate=False),
    ),
    "default without calibration": dataclasses.replace(BASE, calibration=None),
    "default with another decoder": with_codec(BASE, depth=0),
    "plain at another target": dataclasses.replace(PLAIN, target_bpw=None, target_ratio=5.0),
    "plain and calibrated at another target": dataclasses.replace(
        PLAIN, target_bpw=3.5, calibration=CalibrationConfig(tokens=1024)
    ),
    "settings that had no option": with_codec(kmeans_iterations=3, max_sample=100, sample_per_codeword=9),
    "bound on the indices": dataclasses.replace(BASE, max_index_bits=9, embedding_extra_bits=0.25),
    "paper, d left to the planner": dataclasses.replace(preset("paper-8x"), vector_len=None, dense_first=0),
    "paper at another target": dataclasses.replace(preset("paper-8x"), target_bpw=2.25),
    "short calibration": dataclasses.replace(
        PLAIN, calibration=CalibrationConfig(tokens=64, context=32, damping=0.1)
    ),
    "refined three times": with_calibration(refine_epochs=3, refine_rate=1e-4, sensitivity_tokens=512),
    "compensated": with_calibration(compensate=20, compensate_rate=0.01),
    "trellis": with_codec(BASE, trellis_width=10, codebook_source="seed"),
    "independent indices, calibrated": with_codec(BASE, trellis_width=None, codebook_source="fit"),
    "d of the codec": with_codec(vector_len=2),
    "target unused": dataclasses.replace(PLAIN, vector_len=8, codebook_size=64, target_bpw=2.02),
    "networks at another target": dataclasses.replace(with_codec(depth=1, hidden=0), target_bpw=2.5),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = command_for("./a model", "out dir", CONFIGS[name].to_dict())
    assert not command.missing
    assert parsed(command.text, monkeypatch) == CONFIGS[name]


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_named_and_nothing_else(name: str) -> None:
    assert len(as_options(PRESETS[name].config)) <= 2


def test_a_target_that_no_option_gives_is_named() -> None:
    config = dataclasses.replace(PLAIN, vector_len=5, codebook_size=32, target_bpw=2.5)
    assert command_for("m", "out", config.to_dict()).missing == ("target_bpw",)


def test_no_calibration_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    config = dataclasses.replace(preset("calibrated-8x"), calibration=None)
    command = command_for("m", "out", config.to_dict())
    assert "--no-calibration" in command.text and not command.missing
    assert parsed(command.text, monkeypatch) == config


def test_settings_of_a_later_version_give_no_command() -> None:
    values = {**BASE.to_dict(), "window_bits": 3}
    assert command_for("m", "out", values) == Command() == command_for("m", "out", {"codec": None})
    trained = LoraTuneConfig().to_dict()
    later = [{**trained, "mode": "sparse"}, {**trained, "rank": "many"}, {**trained, "momentum": 1}]
    for config in (*later, {"rank": 4}, None):
        assert adapter_command("c", "a", {"config": config}) == Command()


LOOP = LoopConfig(
    batch_size=3,
    micro_batch=1,
    eval_every=5,
    patience=2,
    checkpoint_every=7,
    gradient_checkpointing=True,
    seed=9,
)
TUNED = {
    "the paper's recipe": LoraTuneConfig(),
    "everything else": LoraTuneConfig(
        rank=4,
        alpha=8,
        dropout=0.1,
        targets=("q_proj", "v_proj"),
        epochs=1.5,
        steps=6,
        learning_rate=1e-3,
        context=128,
        texts=("a b.json", "c"),
        validation_items=5,
        mode="packed",
        loop=dataclasses.replace(LOOP, dtype="float32", max_grad_norm=0.0, warmup=0.25),
    ),
}


@pytest.mark.parametrize("name", TUNED)
def test_round_trip_of_an_adapter(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    command = adapter_command("my model", "out dir", {"config": TUNED[name].to_dict()})
    assert not command.missing
    assert parsed(command.text, monkeypatch) == TUNED[name]


def test_round_trip_of_a_distillation(monkeypatch: pytest.MonkeyPatch) -> None:
    config = DistillConfig(
        steps=7,
        context=64,
        texts=("a b.txt",),
        validation_windows=2,
        validation_text="v.txt",
        lr_scale=0.0,
        label_weight=0.25,
        loop=dataclasses.replace(LOOP, warmup=0.5),
    )
    words = ["pocketllm", "finetune", "f", "-o", "out", *finetune_as_options(config)]
    assert parsed(shlex.join(words), monkeypatch) == config
