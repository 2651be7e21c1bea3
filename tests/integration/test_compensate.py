"""Compensation on tiny models: what it gains, its groups, the same bytes after a kill. Every architecture is compressed
with it in test_calibrated.py."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pocketllm
from pocketllm.calibrate.blocks import BlockStream
from pocketllm.calibrate.calibration import read_windows
from pocketllm.compression import compress_job
from pocketllm.compression.compensate import compensated, groups_in_order
from pocketllm.compression.memory_plan import MemoryPlan, plan_memory
from pocketllm.compression.progress import Event
from pocketllm.plan.selection import classify
from pocketllm.plan.target import planned
from pocketllm.runtime.layers import packed_matrices
from pocketllm.source.dense_checkpoint import open_dense
from tests import tiny
from tests.commands import contents, kill_now, killed
from tests.integration.test_architectures import load

TUNED = tiny.on_trellis(calibration={"compensate": 2})


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("compensated") / "dense")


@pytest.fixture(scope="module")
def measured(source: Path) -> Path:
    return source.parent / "measured"


@pytest.fixture(scope="module")
def whole(source: Path, measured: Path) -> Path:
    """The output of an unbroken run."""
    pocketllm.compress(source, TUNED, source.parent / "whole", calibration_folder=measured)
    return source.parent / "whole"


def test_the_first_group_is_encoded_as_without(
    source: Path, measured: Path, whole: Path, tmp_path: Path
) -> None:
    """All later ones for what they were tuned to."""
    pocketllm.compress(source, tiny.on_trellis(), tmp_path / "out", calibration_folder=measured)
    one, other = (packed_matrices(load(folder, "packed")) for folder in (tmp_path / "out", whole))
    path = "model.layers.0."
    inside = [name for name in one if name.startswith(path)]
    same = {name.removeprefix(path) for name in inside if torch.equal(one[name](), other[name]())}
    assert same == {f"self_attn.{kind}_proj.weight" for kind in "qkv"}


@pytest.mark.parametrize(
    "at", ["layers.0: compensation", "layers.1.self_attn.o_proj", "layers.1.mlp.down_proj"]
)
def test_killed_and_started_again(at: str, source: Path, measured: Path, whole: Path, tmp_path: Path) -> None:
    """Before the first steps, after some, and after the last."""

    def progress(event: Event) -> None:
        if event.stage == "encode" and at in event.detail:
            kill_now()

    def compress(**how: Any) -> None:
        pocketllm.compress(source, TUNED, tmp_path / "out", calibration_folder=measured, **how)

    killed(lambda: compress(progress=progress))
    assert (tmp_path / "out.partial").exists()
    compress()
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.parametrize(
    ("architecture", "groups"),
    [
        ("llama", ["q_proj k_proj v_proj", "o_proj", "gate_proj up_proj", "down_proj"]),
        ("phi", ["q_proj k_proj v_proj", "dense", "fc1", "fc2"]),
        ("mixtral", ["q_proj k_proj v_proj", "o_proj", "gate_up_proj down_proj"]),
    ],
)
def test_groups(architecture: str, groups: list[str], tmp_path: Path) -> None:
    opened = open_dense(tiny.save(tmp_path / "dense", architecture))
    matrices, _ = classify(opened, TUNED)
    stream = BlockStream(opened, torch.arange(90).reshape(3, 30))
    with stream.loaded(0) as (path, block):
        inside = [m for m in matrices if m.name.startswith(f"{path}.")]
        found = groups_in_order(stream, block, inside)
    assert [" ".join(m.kind.rpartition(".")[2] for m in group) for group in found] == groups


def test_later_weights_make_up_for_earlier_ones(source: Path) -> None:
    """On text that no step saw; without an error of the earlier ones there is nothing to make up for."""
    opened, state = open_dense(source), torch.get_rng_state()
    text = read_windows(opened, TUNED)
    assert text is not None and TUNED.calibration is not None
    settings = replace(TUNED.calibration, compensate=30)
    stream = BlockStream(opened, text.windows, batch=2)
    matrices, _ = classify(opened, TUNED)
    later = [m for m in matrices if m.name.startswith("model.layers.0.mlp.")]
    with stream.loaded(0) as (_, block):
        targets = stream.run(block, stream.hidden)
        name, steps = "model.layers.0.self_attn.o_proj.weight", len(targets) - 2
        value = stream.model.get_parameter(name)
        generator = torch.Generator().manual_seed(0)
        stream.set_weight(name, value + 0.01 * torch.randn(value.shape, generator=generator))

        def error() -> float:
            found = stream.run(block, stream.hidden)[steps:]
            return sum(float((a - b).square().mean()) for a, b in zip(found, targets[steps:], strict=True))

        before, tuned = error(), compensated(stream, block, later, targets[:steps], settings, seed=0)
        assert list(tuned) == [m.name for m in later]
        again = compensated(stream, block, later, targets[:steps], settings, seed=0)
        assert all(torch.equal(tuned[name], again[name]) for name in tuned)
        for name, weight in tuned.items():
            stream.set_weight(name, weight)
        assert error() < 0.9 * before
        # Steps that raise the loss on what is held out are taken back.
        wild = replace(settings, compensate_rate=1e3)
        kept = compensated(stream, block, later, targets[:steps], wild, seed=0)
        assert all(torch.equal(kept[name], tuned[name]) for name in tuned)
    assert torch.equal(torch.get_rng_state(), state)


def test_memory(source: Path, tmp_path: Path) -> None:
    """The plan knows the stage and what is kept."""
    opened = open_dense(source)
    plan, windows = planned(opened, TUNED, "tiny").plan, torch.arange(96 * 16).reshape(16, 96) % 96
    found = plan_memory(opened, plan, windows, 1).stages
    without = plan_memory(opened, replace(plan, config=tiny.on_trellis()), windows, 1).stages
    assert found.keys() - without.keys() == {"encode: compensation"}
    assert found["encode: blocks"] > without["encode: blocks"]


def test_activations_on_disk_give_the_same_bytes(
    source: Path, measured: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compress_job, "plan_memory", lambda *given: MemoryPlan(on_disk=True, at_once=1))
    config = replace(TUNED, max_memory_gb=10.0)
    pocketllm.compress(source, config, tmp_path / "out", calibration_folder=measured)
    assert contents(tmp_path / "out") == contents(whole)
