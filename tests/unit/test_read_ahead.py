"""Reading ahead: the bytes that are asked for are those of the tensors of the next block."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from pocketllm.calibrate import block_weights
from pocketllm.calibrate.blocks import BlockStream
from pocketllm.format.weight_files import tensor_bytes
from pocketllm.source.assembly import Part
from pocketllm.source.dense_checkpoint import open_dense
from pocketllm.source.read_ahead import read_ahead


def test_the_bytes_asked_for_hold_the_tensors(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, asked = open_dense(source), list[tuple[int, int]]()
    monkeypatch.setattr(os, "posix_fadvise", lambda fd, *place: asked.append(place[:2]), raising=False)
    for name, parts in opened.parts.items():
        ((file, begin, size),) = read_ahead(parts)
        assert file.read_bytes()[begin : begin + size] == tensor_bytes(opened.read(name))
    assert len(asked) == len(opened.parts)
    everything = read_ahead(part for parts in opened.parts.values() for part in parts)
    stored = sum(opened.read(name).nbytes for name in opened.parts)
    assert len(everything) == 1 and everything[0][2] == stored  # they lie next to each other


def test_tensors_far_apart_are_runs_of_their_own(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file(
        {"a": torch.zeros(10), "b": torch.zeros(1 << 19), "c": torch.ones(10)}, tmp_path / "x.safetensors"
    )
    found = read_ahead(Part(tmp_path / "x.safetensors", key, None) for key in "ca")
    assert [size for _, _, size in found] == [40, 40] and found[0][1] + 40 + (1 << 21) == found[1][1]


def test_what_cannot_be_read_is_left_to_those_who_need_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken").write_bytes(b"\xff" * 4)
    for file in ("missing", "broken"):
        assert read_ahead([Part(tmp_path / file, "x", None)]) == [(tmp_path / file, 0, 0)]
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    assert read_ahead([Part(tmp_path / "missing", "x", None)]) == [(tmp_path / "missing", 0, 0)]


def test_the_next_block_is_read_while_one_is_computed(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened, events = open_dense(source), list[Any]()
    monkeypatch.setattr(block_weights, "read_ahead", lambda parts: events.append({p.key for p in parts}))
    stream = BlockStream(opened, torch.arange(8)[None])
    for path, _ in stream:
        events.append(path)
    with stream.loaded(1, 0):
        events.append("backward")
    with stream.loaded(0):
        events.append("alone")
    blocks = [
        {part.key for name, parts in opened.parts.items() if f".{n}." in name for part in parts}
        for n in (0, 1)
    ]
    assert events == [blocks[1], "model.layers.0", "model.layers.1", blocks[0], "backward", "alone"]
