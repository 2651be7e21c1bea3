"""Files that hang, swell or make no sense: an error that names the file, before anything is built of them."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pocketllm
from pocketllm.errors import FormatError, OutputError, PocketError, SourceError
from pocketllm.format import checkpoint as ckpt
from pocketllm.format.kept import read_kept, write_kept
from pocketllm.recover.adapter import check_adapter
from pocketllm.runtime.decode import Matrices
from tests import tiny
from tests.commands import Run
from tests.integration.test_trust_files import sign

EMBEDDING = "model.embed_tokens.weight"


def fifo(path: Path) -> None:
    os.mkfifo(path)


SPECIAL: dict[str, Callable[[Path], Any]] = {
    "not a regular file": fifo,
    "not a regular file; remove it, or fetch": lambda path: path.symlink_to("/dev/zero"),
    "cannot be read": lambda path: path.symlink_to(path.name),
    "a link to a file that is missing": lambda path: path.symlink_to("nowhere"),
    "a link that leads out of the folder": lambda path: path.symlink_to("/etc/hostname"),
    "not a regular file; remove": Path.mkdir,
}


@pytest.mark.parametrize("words", SPECIAL)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "pocketllm.json", "tokenizer.json"])
def test_no_regular_file_in_a_compressed_model(words: str, name: str, copy: Path) -> None:
    (copy / name).unlink()
    SPECIAL[words](copy / name)
    for read in (pocketllm.load, ckpt.verify):
        with pytest.raises(FormatError, match=f"{name}: {words}|{name}: missing"):
            read(copy)


@pytest.mark.parametrize("words", SPECIAL)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_no_regular_file_in_a_dense_model(words: str, name: str, source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "dense"))
    (folder / name).unlink()
    SPECIAL[words](folder / name)
    with pytest.raises(SourceError, match=f"{name}: {words}|no .*safetensors|its tokenizer|{folder}"):
        pocketllm.dry_run(folder, tiny.calibrated(tiny.settings()))


def test_no_regular_file_in_an_adapter(small: Path, tmp_path: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 1}')
        (tmp_path / name).unlink(missing_ok=True)
        os.mkfifo(tmp_path / name)
        with pytest.raises(FormatError, match=f"{name}: not a regular file"):
            check_adapter(tmp_path, small)
        (tmp_path / name).unlink()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda q: q["matrices"][EMBEDDING].__setitem__(0, [1 << 40, 36]),
            "has shape .* the weight files have",
        ),
        (
            lambda q: q["matrices"][EMBEDDING].__setitem__(0, [96, 1 << 62]),
            "has shape .* the weight files have",
        ),
        (
            lambda q: q.update(codebooks=[[1 << 20, 64, n, "0" * 8] for n in range(9)]),
            "vector_len|codebooks of .* numbers",
        ),
    ],
)
def test_sizes_are_compared_with_the_bytes_that_are_there(
    change: Callable[[Any], Any], words: str, copy: Path
) -> None:
    """Whoever signs the folder: nothing of the size that it speaks of is made."""
    config = json.loads((copy / "config.json").read_text())
    change(config["quantization_config"])
    if "codebooks of" in words:
        for decoder in config["quantization_config"]["decoders"]:
            decoder["vector_len"] = 64
    (copy / "config.json").write_text(json.dumps(config))
    sign(copy, lambda files: None, ["config.json"])
    for read in (pocketllm.load, ckpt.verify, Matrices.open):
        with pytest.raises(FormatError, match=rf"config\.json: .*({words})"):
            read(copy)


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "num_local_experts", "n_routed_experts"])
def test_layers_are_counted_before_a_model_is_built(
    key: str, copy: Path, source: Path, tmp_path: Path
) -> None:
    dense = Path(shutil.copytree(source, tmp_path / "dense"))
    for folder in (copy, dense):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, key: 1 << 40}))
    sign(copy, lambda files: None, ["config.json"])
    with pytest.raises(FormatError, match=rf"config\.json: {key} is 1099511627776, the files hold"):
        pocketllm.load(copy)
    with pytest.raises(SourceError, match=rf"config\.json: {key} is 1099511627776, the files hold"):
        pocketllm.dry_run(dense, tiny.settings())


NO_OBJECT = ["[]", "5", '"x"', "null", "[" * 100_000 + "]" * 100_000, "{", "\ud83d", "", "1" * 5000]


@pytest.mark.parametrize("text", NO_OBJECT, ids=lambda text: text[:4] + str(len(text)))
@pytest.mark.parametrize("name", ["config.json", "pocketllm.json"])
def test_json_that_is_no_object(text: str, name: str, copy: Path, run: Run) -> None:
    (copy / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    for read in (pocketllm.load, ckpt.verify):
        with pytest.raises(FormatError, match=f"{name}: damaged"):
            read(copy)
    for command in (("info", copy), ("generate", copy, "--prompt", "a"), ("report", copy)):
        code, _, err = run(*command)
        assert code == 1 and name in err and "Traceback" not in err


@pytest.mark.parametrize("text", NO_OBJECT, ids=lambda text: text[:4] + str(len(text)))
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_of_a_dense_model_that_is_no_object(text: str, name: str, source: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(source, tmp_path / "dense"))
    (folder / name).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(SourceError, match=name):
        pocketllm.compress(folder, tiny.settings(), tmp_path / "out")


def test_json_is_not_read_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pocketllm import files

    (tmp_path / "a.json").write_text("{}")
    assert files.read_object(tmp_path / "a.json") == {}
    monkeypatch.setattr(files, "_LARGEST_JSON", 1)
    with pytest.raises(ValueError, match="2 bytes, wanted at most 1"):
        files.read_object(tmp_path / "a.json")
    with pytest.raises(OSError, match="not a regular file"):
        files.read_object(tmp_path)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.update(bytes_on_disk=0), "bytes_on_disk: got 0, wanted more than 0"),
        (lambda r: r.update(ratio_files_bf16=float("nan")), "ratio_files_bf16: got nan, wanted more than 0"),
        (lambda r: r.update(dense_model_bytes_bf16=-1), "dense_model_bytes_bf16: got -1"),
        (lambda r: r["matrices"][0].update(vector_len=0), r"matrices\[0\]\.vector_len: got 0"),
        (lambda r: r["matrices"][0].update(shape=[0, 3]), r"matrices\[0\]\.shape"),
        (lambda r: r.update(bytes_on_disk=True), "bytes_on_disk: got True"),
    ],
)
def test_a_report_that_cannot_be_counted_with(
    change: Callable[[Any], Any], words: str, copy: Path, run: Run
) -> None:
    report = json.loads((copy / ckpt.REPORT_NAME).read_text())
    change(report)
    (copy / ckpt.REPORT_NAME).write_text(json.dumps(report))
    code, _, err = run("info", copy, "--no-check")
    assert code == 1 and "pocketllm.json: damaged" in err
    with pytest.raises(FormatError, match=words):
        ckpt.read_report(copy)


def test_what_is_kept_has_a_checksum(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    tensors = {
        "b": torch.arange(6).reshape(2, 3),
        "a": torch.ones(0),
        "c": torch.tensor(1.5, dtype=torch.bfloat16),
    }
    write_kept(path, tensors, {"x": 1})
    read, facts = read_kept(path)
    assert facts == {"x": 1} and all(torch.equal(read[name], value) for name, value in tensors.items())
    data = path.read_bytes()
    for place in (len(data) - 1, len(data) - 20, data.index(b'\\"x\\": 1') + 6, data.index(b"I64")):
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(bytes(changed))
        with pytest.raises(ValueError, match=r"altered|not what was written"):
            read_kept(path)
    with pytest.raises(OSError, match="missing, or not a regular file"):
        read_kept(tmp_path)


def _cached(folder: Path) -> Path:
    (path,) = folder.glob("sensitivity-*.safetensors")
    return path


@pytest.mark.parametrize("two_sided", [True, False])
def test_a_damaged_cache_is_made_again(
    two_sided: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = tmp_path / "cache"
    source = tiny.save(tmp_path / "dense", num_hidden_layers=1)
    (tmp_path / "text.txt").write_text("a text that is long enough for some windows. " * 10)
    few = {"tokens": 64, "sensitivity_tokens": 32, "texts": (str(tmp_path / "text.txt"),)}
    config = tiny.on_trellis(3.0, calibration={"two_sided": two_sided, "sequential": False, **few})
    pocketllm.compress(source, config, tmp_path / "a", calibration_folder=cache)
    damaged = [_cached(cache), *sorted(cache.glob("outputs-*/*"))[:1], *sorted(cache.glob("inputs-*/*"))[:1]]
    assert len(damaged) == 2 + two_sided
    for number, path in enumerate(damaged):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            pocketllm.compress(source, config, tmp_path / f"b{number}", calibration_folder=cache)
        assert f"{path}: damaged" in caplog.text and caplog.text.count(": damaged") == 1
        assert (tmp_path / f"b{number}" / "model.safetensors").read_bytes() == (
            tmp_path / "a" / "model.safetensors"
        ).read_bytes()
    for path in cache.rglob("*.safetensors"):
        read_kept(path)  # whatever was damaged is there again


def test_a_cache_that_cannot_be_written_is_a_warning_before_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("POCKETLLM_CACHE", str(tmp_path / "file" / "cache"))
    seen = []

    def progress(event: Any) -> None:
        if event.stage == "measure" and not seen:
            seen.append(caplog.text)

    with caplog.at_level(logging.WARNING):
        pocketllm.compress(source, tiny.on_trellis(), tmp_path / "out", progress=progress)
    assert "the cache cannot be written" in seen[0]
    with pytest.raises(OutputError, match="choose another folder for the measurements"):
        pocketllm.dry_run(source, tiny.on_trellis(), calibration_folder=tmp_path / "file" / "cache")


def test_a_result_that_cannot_be_kept_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from pocketllm.evaluate import results

    (tmp_path / "file").write_text("x")
    monkeypatch.setenv("POCKETLLM_CACHE", str(tmp_path / "file"))
    results.keep({"a": 1}, {"b": 2})
    assert "cannot be kept" in caplog.text
    (tmp_path / "model").mkdir()
    os.mkfifo(tmp_path / "model" / "a")
    with pytest.raises(SourceError, match="not a regular file"):
        results.folder_digest(tmp_path / "model")


def test_names_that_the_system_does_not_take(tmp_path: Path) -> None:
    for name in (f"{tmp_path}/{'x' * 300}", f"{tmp_path}/a\0b"):
        for read in (pocketllm.load, lambda name: pocketllm.dry_run(name, tiny.settings())):
            with pytest.raises(PocketError, match="no such folder"):
                read(name)


def test_a_folder_within_that_cannot_be_listed(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pocketllm.files import files_below

    def refused(path: Any) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(SourceError, match=r"cannot be read \(Permission denied\)"):
        list(files_below(source, SourceError))
