"""Plans of memory: what is given up first, what is refused, and activations on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pocketllm
from pocketllm.calibrate.activations import SpooledActivations, spooled
from pocketllm.compression.memory_plan import check_limit, plan_memory
from pocketllm.config import CompressConfig
from pocketllm.errors import ConfigError, OutputError
from pocketllm.format.mapped_pages import keep_no_holes, return_freed
from pocketllm.machine import resident_bytes
from pocketllm.plan.target import planned
from pocketllm.source.dense_checkpoint import DenseCheckpoint, open_dense
from tests import tiny

WINDOWS = (
    torch.arange(96).repeat(11000)[: 1 << 20].reshape(2048, 512)
)  # 2 * 4 * 36 * 2^20 bytes of activations
HELD = 3 * 10**8


@pytest.fixture(scope="module")
def opened(source: Path) -> DenseCheckpoint:
    return open_dense(source)


def plan(
    opened: DenseCheckpoint, windows: Tensor = WINDOWS, gb: float | None = None, **changes: float
) -> object:
    config = replace(tiny.on_trellis(**changes), max_memory_gb=gb)
    return plan_memory(opened, planned(opened, config, "tiny").plan, windows, HELD)


def test_without_a_limit_nothing_is_given_up(opened: DenseCheckpoint) -> None:
    found = plan_memory(opened, planned(opened, tiny.on_trellis(), "tiny").plan, WINDOWS, HELD)
    assert (found.on_disk, found.at_once) == (False, 0)
    assert found.peak == max(found.stages.values()) > HELD + 2 * 4 * 36 * WINDOWS.numel()


def test_activations_go_to_disk_first_and_matrices_one_by_one_last(opened: DenseCheckpoint) -> None:
    config = tiny.on_trellis()
    first = planned(opened, config, "tiny").plan
    free = plan_memory(opened, first, WINDOWS, HELD).peak
    limited = replace(first, config=replace(config, max_memory_gb=(free - 10**8) / 1e9))
    found = plan_memory(opened, limited, WINDOWS, HELD)
    assert found.on_disk and found.peak <= free - 10**8
    with pytest.raises(
        ConfigError, match=r"got 0.3, wanted at least (\d\.\d\d) for this .* holds 0.30 already"
    ) as error:
        plan_memory(opened, replace(first, config=replace(config, max_memory_gb=0.3)), WINDOWS, HELD)
    least = float(str(error.value).split("at least ")[1].split()[0])
    kept = plan_memory(opened, replace(first, config=replace(config, max_memory_gb=least)), WINDOWS, HELD)
    assert kept.on_disk and kept.peak <= least * 1e9 < free
    with pytest.raises(ConfigError, match="wanted at least"):
        plan_memory(opened, replace(first, config=replace(config, max_memory_gb=least - 0.05)), WINDOWS, HELD)


def test_fewer_matrices_at_once_take_less(tmp_path: Path) -> None:
    wide = open_dense(tiny.save(tmp_path / "wide", intermediate_size=1024, num_hidden_layers=1))
    first, threads = planned(wide, tiny.on_trellis(), "tiny").plan, torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        free = plan_memory(wide, first, WINDOWS[:2], HELD).peak
        config = replace(first.config, max_memory_gb=(free - 10**7) / 1e9)
        found = plan_memory(wide, replace(first, config=config), WINDOWS[:2], HELD)
    finally:
        torch.set_num_threads(threads)
    assert not found.on_disk and found.at_once in (1, 2)


@pytest.mark.parametrize(
    ("config", "device", "ranks", "got"),
    [
        (tiny.target(6.0, max_memory_gb=1.0), "cpu", 1, "no calibration"),
        (
            tiny.on_trellis(max_memory_gb=1.0, calibration={"refine_epochs": 1}),
            "cpu",
            1,
            "calibration.refine_epochs",
        ),
        (tiny.on_trellis(max_memory_gb=1.0), "cuda", 1, "device cuda"),
        (tiny.on_trellis(max_memory_gb=1.0), "cpu", 2, "2 processes"),
    ],
)
def test_what_cannot_be_planned_for_is_refused(
    config: CompressConfig, device: str, ranks: int, got: str
) -> None:
    with pytest.raises(
        ConfigError, match=f"max_memory_gb: got {got}, wanted a calibrated compression by one process"
    ):
        check_limit(config, device, ranks)
    check_limit(replace(config, max_memory_gb=None), device, ranks)
    check_limit(tiny.on_trellis(max_memory_gb=1.0), "cpu", 1)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_limit_is_a_positive_number(value: float) -> None:
    with pytest.raises(ConfigError, match=f"max_memory_gb: got {value}, wanted more than 0"):
        tiny.on_trellis(max_memory_gb=value)


def test_a_limit_is_no_part_of_the_result() -> None:
    assert tiny.on_trellis(max_memory_gb=1.0).to_dict() == tiny.on_trellis().to_dict()
    assert CompressConfig.from_dict(tiny.on_trellis(max_memory_gb=1.0).to_dict()) == tiny.on_trellis()
    assert pocketllm.preset(pocketllm.config.DEFAULT_PRESET).max_memory_gb is None


def test_activations_on_disk_have_the_same_bits(tmp_path: Path) -> None:
    given = [
        torch.randn(2, 3, 4),
        torch.randn(1, 3, 4, dtype=torch.bfloat16),
        torch.tensor([float("nan"), -0.0]),
    ]
    kept = spooled(given, tmp_path, "cpu")
    assert spooled(kept, tmp_path, "cpu") is kept
    assert len(kept) == 3 and len(list(tmp_path.glob("activations-*/*"))) == 3
    for read in (list(kept), kept[:], [kept[0], kept[1], kept[-1]]):
        for one, other in zip(read, given, strict=True):
            assert one.dtype == other.dtype and one.shape == other.shape
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))
    with pytest.raises(IndexError):
        kept[3]
    kept[0].zero_()  # a copy
    assert torch.equal(kept[0], given[0]) and kept[1:2][0].dtype == torch.bfloat16
    del kept
    assert not list(tmp_path.iterdir())


def test_activations_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"no-folder: cannot be written \(No such file"):
        SpooledActivations(tmp_path / "no-folder", "cpu")
    kept = SpooledActivations(tmp_path, "cpu")
    next(tmp_path.iterdir()).rmdir()
    with pytest.raises(OutputError, match=r"0.bin: cannot be written .*; free some space there"):
        kept.append(torch.zeros(3))


def test_freed_memory_is_returned() -> None:
    keep_no_holes()
    large = [torch.ones(1 << 12) for _ in range(6000)]  # 98 MB
    held = resident_bytes()
    del large[:-1]  # the last one is at the end of the heap
    return_freed()
    left = resident_bytes()
    assert held is not None and left is not None and 10**7 < left < held - 8 * 10**7
