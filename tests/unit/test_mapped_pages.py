"""Pages of mapped files can be dropped from memory and come back; other memory is left alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pocketllm.format.mapped_pages import MappedPages, drop_files
from pocketllm.format.weight_files import checksum

MEBIBYTE = 1 << 20


def resident_file_bytes() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("RssFile:")).split()[1])


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which memory maps files")
def test_mapped_tensors_leave_memory_and_return(tmp_path: Path) -> None:
    stored = torch.arange(32 * MEBIBYTE // 8)
    save_file({"x": stored}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        mapped = file.get_tensor("x")
    before = checksum(mapped)
    held = resident_file_bytes()
    MappedPages().drop(mapped)
    assert resident_file_bytes() < held - 28 * MEBIBYTE
    assert checksum(mapped) == before and torch.equal(mapped, stored)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which memory maps files")
def test_pages_that_neighbours_share_leave_memory_with_both(tmp_path: Path) -> None:
    save_file(
        {f"{n:03}": torch.full((3000,), n % 256, dtype=torch.uint8) for n in range(999)},
        tmp_path / "x.safetensors",
    )
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        mapped = [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118
    assert all(bool((tensor == n % 256).all()) for n, tensor in enumerate(mapped))
    held = resident_file_bytes()
    for tensor in mapped:
        MappedPages().drop(tensor)  # none holds a page of its own
    assert resident_file_bytes() > held - MEBIBYTE
    MappedPages().drop(*reversed(mapped))
    assert resident_file_bytes() < held - 2 * MEBIBYTE
    assert all(bool((tensor == n % 256).all()) for n, tensor in enumerate(mapped))


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux says which memory maps files")
def test_all_memory_that_maps_a_file(tmp_path: Path) -> None:
    stored = torch.arange(32 * MEBIBYTE // 8)
    for name in ("x", "y"):
        save_file({"x": stored, "z": stored[:5].clone()}, tmp_path / f"{name}.safetensors")
    mapped = []
    for name in ("x", "y"):
        with safe_open(tmp_path / f"{name}.safetensors", framework="pt") as file:
            mapped.append(file.get_tensor("x"))
    assert checksum(mapped[0]) == checksum(mapped[1])
    held = resident_file_bytes()
    (tmp_path / "link").symlink_to(tmp_path / "x.safetensors")
    drop_files([tmp_path / "link", tmp_path / "absent"])
    assert held - 36 * MEBIBYTE < resident_file_bytes() < held - 28 * MEBIBYTE
    assert torch.equal(mapped[0], stored)


def test_other_memory_is_left_alone() -> None:
    kept = torch.arange(MEBIBYTE)
    MappedPages().drop(kept, kept[::2], torch.empty(3, device="meta"), torch.empty(0))
    assert torch.equal(kept, torch.arange(MEBIBYTE))
