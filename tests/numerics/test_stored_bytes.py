"""Models that earlier versions stored: they load, and decode to the weights that they decoded to then.

tests/data/compressed/make.py made them. What comes out of a compression depends on the processor and on the
versions of libraries, so a new one is compared in layout, sizes and errors, not byte by byte. What stored files
decode to depends on rounding alone.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pocketllm
from pocketllm.format import read_report, verify
from pocketllm.runtime import Matrices
from tests import tiny
from tests.data.compressed import make

FOLDERS = sorted(path.parent for path in make.HERE.glob("*/pocketllm.json"))


def ids(folder: Path) -> str:
    return folder.name


def wanted(folder: Path) -> dict[str, torch.Tensor]:
    """What it decodes to, float32 by parameter name."""
    return load_file(folder.with_name(f"{folder.name}.decoded.safetensors"))


def header(folder: Path) -> dict[str, Any]:
    """Dtype, shape and place of every stored tensor."""
    data = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    found: dict[str, Any] = json.loads(data[8 : 8 + length])
    return found


def layout(folder: Path) -> dict[str, Any]:
    """The stored form without checksums, the version that wrote it, and how to load it."""
    found: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    body = found["quantization_config"]
    body["matrices"] = {name: entry[:-1] for name, entry in body["matrices"].items()}
    body["codebooks"] = [entry[:-1] for entry in body["codebooks"]]
    body["decoders"] = [{k: v for k, v in entry.items() if k != "crc32"} for entry in body["decoders"]]
    del body["producer"], body["mode"]
    return body


def test_there_are_some() -> None:
    assert [folder.name for folder in FOLDERS] == [
        f"0.1.0-{name}" for name in ("calibrated", "hashed", "published", "seeded")
    ]


@pytest.mark.parametrize("folder", FOLDERS, ids=ids)
def test_their_checksums_are_right(folder: Path) -> None:
    assert set(verify(folder).matrices) == set(wanted(folder))
    assert read_report(folder)["format_version"] == (3 if folder.name.endswith("hashed") else 2)


@pytest.mark.parametrize("mode", ["dense", "packed"])
@pytest.mark.parametrize("folder", FOLDERS, ids=ids)
def test_they_decode_to_what_they_decoded_to(folder: Path, mode: str) -> None:
    """Some units in the last place are for processors that add in another order."""
    model, _ = pocketllm.load(folder, mode=mode, dtype=torch.float32)
    for name, expected in wanted(folder).items():
        parent, _, leaf = name.rpartition(".")
        found = getattr(model.get_submodule(parent), leaf)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("folder", FOLDERS, ids=ids)
def test_single_matrices_decode_to_it_too(folder: Path) -> None:
    matrices = Matrices.open(folder)
    for name, expected in wanted(folder).items():
        torch.testing.assert_close(matrices.read(name), expected, rtol=1e-5, atol=1e-6, msg=name)


def compressed_again(name: str, folder: Path) -> Path:
    architecture, sizes, config = make.settings()[name]
    pocketllm.compress(tiny.save(folder / "dense", architecture, **sizes), config, folder / "new")
    return folder / "new"


def test_a_new_compression_has_the_same_layout(tmp_path: Path) -> None:
    """The same plan, tensors, layout and size, and about the same errors: nothing of it is measured."""
    folder = make.HERE / "0.1.0-published"
    new = compressed_again("published", tmp_path)
    assert header(new) == header(folder)
    assert layout(new) == layout(folder)
    reports = read_report(new), read_report(folder)
    for key in ("config", "skipped", "codebook_scope"):
        assert reports[0][key] == reports[1][key]
    for one, other in zip(reports[0]["matrices"], reports[1]["matrices"], strict=True):
        assert one["nmse"] == pytest.approx(other["nmse"], rel=0.05)


@pytest.mark.parametrize("name", ["calibrated", "hashed", "seeded"])
def test_a_new_calibrated_compression_is_about_as_good(name: str, tmp_path: Path) -> None:
    """Bits of single matrices follow from measurements; shapes, rotations, settings and the sum do not."""
    folder, new = make.HERE / f"0.1.0-{name}", compressed_again(name, tmp_path)
    layouts, reports = (layout(new), layout(folder)), (read_report(new), read_report(folder))
    fixed = [{key: (*entry[:2], entry[6]) for key, entry in body["matrices"].items()} for body in layouts]
    assert fixed[0] == fixed[1]
    for key in ("config", "skipped", "codebook_scope"):
        assert reports[0][key] == reports[1][key]
    assert reports[0]["bpw_matrices"] == pytest.approx(reports[1]["bpw_matrices"], rel=0.02)
    means = [sum(m["nmse"] for m in report["matrices"]) / len(report["matrices"]) for report in reports]
    assert means[0] == pytest.approx(means[1], rel=0.1)
