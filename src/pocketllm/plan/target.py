"""From a target (bits per weight, or bytes of the output folder) to the plan that meets it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch

from pocketllm.config import CompressConfig
from pocketllm.config.constants import SIZE_LEFT, SIZE_ROUNDS
from pocketllm.errors import ConfigError, TargetError
from pocketllm.plan.bit_allocation import make_plan
from pocketllm.plan.matrices import Plan
from pocketllm.plan.selection import classify
from pocketllm.plan.sizes import PlannedModel
from pocketllm.source.dense_checkpoint import DenseCheckpoint


def planned(
    source: DenseCheckpoint,
    config: CompressConfig,
    model: str,
    importance: Mapping[str, float] | None = None,
    strip_rows: Mapping[str, int] | None = None,
) -> PlannedModel:
    """Plan a model; a target for the output folder is converted to bits per weight.

    Args:
        importance, strip_rows: as in `make_plan`.

    Returns:
        The planned model with its exact bytes.

    Raises:
        ConfigError: as `make_plan`; or a target for the folder that cannot be met (the message names the
            smallest and largest possible).
    """

    def at(bpw: float) -> PlannedModel:
        changed = replace(config, target_bpw=min(bpw, 16.0), target_bytes=None, target_ratio=None)
        plan = make_plan(source, changed, importance, strip_rows)
        return PlannedModel(source, replace(plan, config=config), model)

    if config.target_bytes is None and config.target_ratio is None:
        return PlannedModel(source, make_plan(source, config, importance, strip_rows), model)
    matrices, dense = classify(source, config)
    empty = PlannedModel(source, Plan((), {}, tuple(dense), "model", config), model)
    other = sum(path.stat().st_size for path in empty.form.copied_files.values())
    weights = sum(m.weights for m in matrices)
    bf16_bytes = 2 * (weights + sum(torch.Size(d.shape).numel() for d in dense)) + other
    target = config.target_bytes or int(bf16_bytes / (config.target_ratio or 1))
    least, most = possible_bpw(source, config, strip_rows)
    ends = at(least), at(most)
    smallest, largest = (end.bytes_on_disk[0] for end in ends)
    if not smallest <= target <= 1.01 * largest:
        described = f"target_bytes: {target:,}"
        if config.target_ratio is not None:
            described = f"target_ratio: {config.target_ratio:g} ({target:,} bytes)"
        raise ConfigError(
            f"{described} cannot be met with these settings; the possible range is {smallest:,} to {largest:,} bytes "
            f"for all files, {bf16_bytes / largest:.2f} to {bf16_bytes / smallest:.2f} times smaller than bf16"
        )
    if target >= largest:
        return ends[1]
    return _search(at, target, weights, (least, most), ends[0])


def possible_bpw(
    source: DenseCheckpoint, config: CompressConfig, strip_rows: Mapping[str, int] | None = None
) -> tuple[float, float]:
    """Least and most stored bits per weight that the settings allow, overrides included."""
    tiny = replace(config, target_bpw=1e-6, target_bytes=None, target_ratio=None)
    try:
        make_plan(source, tiny, strip_rows=strip_rows)
    except TargetError as error:
        return error.least * (1 + 1e-9), error.most * (1 + 1e-9)
    raise AssertionError("a millionth of a bit per weight cannot be planned")


def _search(
    at: Callable[[float], PlannedModel],
    target: int,
    weights: int,
    bits: tuple[float, float],
    best: PlannedModel,
) -> PlannedModel:
    """The largest plan within `target`. Bytes other than those of indices hardly change with the plan.

    Args:
        bits: per weight, a value that fits and one that does not. best: the plan at the former.
    """
    low, high = bits
    total, _ = best.bytes_on_disk
    largest, bpw = total, low
    aim = target * (1 - SIZE_LEFT / 2)  # not the target itself, which would be approached from above for ever
    for _ in range(SIZE_ROUNDS):
        bpw += 8 * (aim - total) / weights
        if not low < bpw < high:
            bpw = (low + high) / 2
        made = at(bpw)
        total, _ = made.bytes_on_disk
        low, high = (bpw, high) if total <= target else (low, bpw)
        if largest < total <= target:
            best, largest = made, total
        if target - largest < SIZE_LEFT * target:
            break
    return best
