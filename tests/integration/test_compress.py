"""The pipeline: same bytes every time, any form of input and output, outputs that are refused, reports."""

from __future__ import annotations

import dataclasses
import errno
import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

import pocketllm
from pocketllm.compression.progress import Event
from pocketllm.errors import FormatError, OutputError
from pocketllm.format import weight_files
from pocketllm.format.checkpoint import verify
from pocketllm.source.dense_checkpoint import DenseCheckpoint
from tests import tiny
from tests.commands import contents


def test_same_arguments_same_bytes(source: Path, small: Path, tmp_path: Path) -> None:
    pocketllm.compress(source, tiny.settings(), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(small)
    verify(tmp_path / "out")
    assert not (tmp_path / "out.partial").exists()


def test_another_seed_gives_another_model(source: Path, small: Path, tmp_path: Path) -> None:
    pocketllm.compress(source, tiny.settings(seed=1), tmp_path / "out")
    assert contents(tmp_path / "out")["model.safetensors"] != contents(small)["model.safetensors"]


def test_outputs_that_are_not_ours(source: Path, small: Path, tmp_path: Path) -> None:
    config = tiny.settings()
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        pocketllm.compress(source, config, tmp_path / "file")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.tex").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="not a compressed model"):
            pocketllm.compress(source, config, tmp_path / "folder", overwrite=overwrite)
    with pytest.raises(OutputError, match="pass --overwrite"):
        pocketllm.compress(source, config, small)
    with pytest.raises(OutputError, match="not a compressed model"):
        pocketllm.compress(source, config, source, overwrite=True)
    (tmp_path / "other.partial").mkdir()
    (tmp_path / "other.partial" / "thesis.tex").write_text("mine")
    with pytest.raises(OutputError, match="not created by pocketllm"):
        pocketllm.compress(source, config, tmp_path / "other")
    assert (tmp_path / "folder" / "thesis.tex").read_text() == "mine"
    assert (tmp_path / "file").read_text() == "mine"


def test_no_write_permission(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **keywords: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(tempfile, "mkdtemp", refuse)
    with pytest.raises(OutputError, match=f"{tmp_path}: cannot be written \\(Permission denied"):
        pocketllm.compress(source, tiny.settings(), tmp_path / "new" / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs a folder where not even root may write")
def test_a_parent_that_refuses_in_spite_of_its_permissions(source: Path) -> None:
    """Said before any work, naming the folder: the model that is given is not even looked for."""
    with pytest.raises(OutputError, match=r"^/proc: cannot be written \(.*choose another output folder"):
        pocketllm.compress("./nowhere", tiny.settings(), "/proc/foo")


def test_overwrite_replaces_an_earlier_model(source: Path, tmp_path: Path) -> None:
    pocketllm.compress(source, tiny.settings(), tmp_path / "out")
    first = contents(tmp_path / "out")
    pocketllm.compress(source, tiny.settings(seed=5), tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "out") != first
    verify(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_empty_output_folder_is_taken(source: Path, small: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    pocketllm.compress(source, tiny.settings(), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(small)


def test_output_in_shards(source: Path, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a model past 5 GB is written, counted before, verified and loaded."""
    monkeypatch.setattr(weight_files, "SHARD_BYTES", 4000)
    planned = pocketllm.dry_run(source, tiny.settings())
    report = pocketllm.compress(source, tiny.settings(), tmp_path / "out")
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert report.bytes_on_disk == planned.bytes_on_disk
    verify(tmp_path / "out")
    one, other = (
        pocketllm.load(folder, mode="dense")[0].state_dict() for folder in (small, tmp_path / "out")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)
    (tmp_path / "out" / files[1]).unlink()
    with pytest.raises(FormatError, match=r"no .* file contains|missing"):
        pocketllm.load(tmp_path / "out")


def test_input_in_shards_and_other_dtypes(source: Path, small: Path, tmp_path: Path) -> None:
    model = tiny.model()
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    tiny.tokenizer().save_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    pocketllm.compress(tmp_path / "shards", tiny.settings(), tmp_path / "out")
    name = "model.safetensors"
    assert contents(tmp_path / "out")[name] == contents(small)[name]
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        folder = tmp_path / str(dtype)
        model.to(dtype).save_pretrained(folder)
        report = pocketllm.compress(folder, tiny.settings(), tmp_path / f"out {dtype}")
        loaded, _ = pocketllm.load(tmp_path / f"out {dtype}", mode="dense")
        assert loaded.dtype == dtype and max(m.nmse for m in report.matrices) < 0.4


@pytest.mark.parametrize("scope", ["matrix", "kind", "model"])
def test_scopes(scope: str, source: Path, tmp_path: Path) -> None:
    config = tiny.settings(codebook_scope=scope, decoder_scope="matrix")
    planned = pocketllm.dry_run(source, config)
    report = pocketllm.compress(source, config, tmp_path / "out")
    assert report.bytes_on_disk == planned.bytes_on_disk
    assert len(report.fits) == {"matrix": 15, "kind": 8, "model": 1}[scope]
    model, _ = pocketllm.load(tmp_path / "out", mode="packed")
    assert len(model.pocketllm.decoders) == 15


@pytest.mark.parametrize("codec", [{"hidden": 0, "depth": 1}, {"hidden": 0, "decoder": "row"}, {"depth": 0}])
def test_affine_decoders_and_none(codec: dict[str, Any], source: Path, tmp_path: Path) -> None:
    config = tiny.settings(codec=codec)
    report = pocketllm.compress(source, config, tmp_path / "out")
    assert report.bytes_on_disk == pocketllm.dry_run(source, config).bytes_on_disk
    each = 2 * config.codec.depth * (5 * 5 + 5)  # float16: a matrix and a shift
    assert report.bytes_by_part["decoders"] == each * len({m.kind for m in report.matrices})
    dense, packed = (pocketllm.load(tmp_path / "out", mode=mode)[0] for mode in ("dense", "packed"))
    ids = torch.arange(20)[None]
    torch.testing.assert_close(dense(ids).logits, packed(ids).logits, rtol=1e-4, atol=1e-4)
    assert all(0 < m.nmse < 0.6 for m in report.matrices)


def test_a_bit_budget_is_met_from_below_and_the_dry_run_is_exact(source: Path, tmp_path: Path) -> None:
    planned = pocketllm.dry_run(source, tiny.target(7.0))
    report = pocketllm.compress(source, tiny.target(7.0), tmp_path / "out")
    assert planned.is_plan and not report.is_plan
    assert report.bytes_on_disk == planned.bytes_on_disk
    assert 6.0 < report.bpw_matrices <= 7.0


def test_memory_does_not_grow_with_the_number_of_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The most weights read and still alive at once, in a model of 2 and one of 8 blocks."""
    import weakref

    original, alive, peak = DenseCheckpoint.read, [0], [0]

    def read(self: DenseCheckpoint, name: str) -> torch.Tensor:
        tensor = original(self, name)
        alive[0] += tensor.numel()
        peak[0] = max(peak[0], alive[0])
        weakref.finalize(tensor, lambda count: alive.__setitem__(0, alive[0] - count), tensor.numel())
        return tensor

    monkeypatch.setattr(DenseCheckpoint, "read", read)
    peaks = []
    for blocks in (2, 8):
        peak[0] = 0
        folder = tiny.save(tmp_path / f"dense{blocks}", num_hidden_layers=blocks)
        pocketllm.compress(folder, tiny.settings(), tmp_path / f"out{blocks}")
        peaks.append(peak[0])
    assert peaks[0] == peaks[1]


def test_progress_tells_every_stage_and_ends_whole(source: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    pocketllm.compress(source, tiny.settings(), tmp_path / "out", progress=events.append)
    assert {event.stage for event in events} >= {"fit", "encode", "write"}
    assert all(0 <= event.share <= 1 for event in events)
    assert events[-1].stage == "write" and events[-1].share == 1.0


def test_utilization_is_complete(source: Path, tmp_path: Path) -> None:
    report = pocketllm.compress(source, tiny.settings(), tmp_path / "out")
    assert min(m.codebook_utilization for m in report.matrices) >= 0.99


def test_the_report_is_what_info_reads(source: Path, small: Path, tmp_path: Path) -> None:
    import json

    from pocketllm.format.checkpoint import read_report
    from pocketllm.format.report import RUN_FACTS, Report

    report = pocketllm.compress(source, tiny.settings(), tmp_path / "out")
    read = Report.from_dict(read_report(tmp_path / "out"))
    unstored = dict.fromkeys(RUN_FACTS)
    assert report.seconds and report.peak_memory_bytes
    written = json.loads(json.dumps(dataclasses.replace(report, **unstored).to_dict()))
    assert json.loads(json.dumps(read.to_dict())) == written
