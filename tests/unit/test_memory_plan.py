"""Plans of memory: what is given up first, what is refused, and activations on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import pocketllm
from pocketllm.calibrate.activations import SpooledActivations, spooled
from pocketllm.calibrate.block_list import shared_with
from pocketllm.calibrate.blocks import BlockStream
from pocketllm.compression.memory_plan import can_plan, plan_memory
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
    ("config", "device", "ranks", "held", "got"),
    [
        (tiny.target(6.0, max_memory_gb=1.0), "cpu", 1, 1, "no calibration"),
        (
            tiny.on_trellis(max_memory_gb=1.0, calibration={"refine_epochs": 1}),
            "cpu",
            1,
            1,
            "calibration.refine_epochs",
        ),
        (tiny.on_trellis(max_memory_gb=1.0), "cuda", 1, 1, "device cuda"),
        (tiny.on_trellis(max_memory_gb=1.0), "cpu", 2, 1, "2 processes"),
        (tiny.on_trellis(max_memory_gb=1.0), "cpu", 1, None, "a system without /proc/self/statm"),
    ],
)
def test_what_cannot_be_planned_for_is_refused(
    config: CompressConfig, device: str, ranks: int, held: int | None, got: str
) -> None:
    with pytest.raises(
        ConfigError, match=f"max_memory_gb: got {got}, wanted a calibrated compression by one process"
    ):
        can_plan(config, device, ranks, held)
    assert not can_plan(replace(config, max_memory_gb=None), device, ranks, held)
    assert can_plan(tiny.on_trellis(max_memory_gb=1.0), "cpu", 1, 1)


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


def test_masks_and_positions_are_kept_once(tmp_path: Path) -> None:
    opened = open_dense(tiny.save(tmp_path / "mixed", "gemma3"))
    stream = BlockStream(opened, torch.arange(96)[:90].reshape(3, 30), batch=1)
    for number, calls in enumerate(stream.calls):
        kept = [_tensors(call) for call in calls]
        assert kept[0] and all([*map(id, each)] == [*map(id, kept[0])] for each in kept), number
    two = BlockStream(opened, torch.arange(90).reshape(3, 30), batch=2)  # the last batch has another shape
    with two.loaded(0) as (_, module), stream.loaded(0) as (_, same):
        torch.testing.assert_close(two.call(module, two.hidden[1], 1), stream.call(same, stream.hidden[2], 2))


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def test_only_equal_tensors_are_shared() -> None:
    kept = torch.zeros(2)
    other = {
        "a": (torch.zeros(2), torch.ones(2), 3),
        "b": torch.zeros(2, dtype=torch.float64),
        "c": torch.zeros(1),
    }
    found = shared_with(other, {"a": (kept, kept, kept), "b": kept, "c": kept})
    assert found["a"][0] is kept and found["a"][1] is other["a"][1] and found["a"][2] == 3
    assert found["b"] is other["b"] and found["c"] is other["c"]
    assert shared_with(kept, None) is kept and shared_with((kept,), (kept, kept)) == (kept,)
