"""`pocketllm doctor`: what runs here, and why the rest does not."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
from pathlib import Path

import pytest
import torch

import pocketllm
import pocketllm_startup
from pocketllm import machine
from pocketllm.codec.kernels import library
from pocketllm.codec.kernels.build_kernels import RECIPES
from pocketllm.runtime import doctor
from tests.commands import Run


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(capsys, monkeypatch)


def test_every_fact_is_there(run: Run) -> None:
    found = run.json("doctor")
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert found["versions"]["pocketllm-codec"] == pocketllm.__version__
    assert found["threads"] == torch.get_num_threads() and found["memory_bytes"] > 1 << 28
    assert set(found["kernels"]) == {*RECIPES, "triton"} and set(found["extras"]) == set(doctor.EXTRAS)
    assert found["free_disk_bytes"] > 0 and found["cache"]["works"]
    for state in (*found["kernels"].values(), *found["extras"].values(), found["startup_hook"]):
        assert state["works"] is (state["reason"] == "")


def test_the_table_names_every_fact(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "EXTRAS", {**doctor.EXTRAS, "absent_module": "pip install 'x[y]'"})
    code, out, _ = run("doctor")
    assert code == 0
    for words in ("python", "processor", "GPU", "kernels: trellis", "lm_eval", "cache", "start-up hook"):
        assert words in out
    assert "not installed; pip install 'x[y]'" in out


def test_kernels_that_are_switched_off_or_cannot_be_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("POCKETLLM_CACHE", str(tmp_path))
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'no such header' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert doctor.kernels()["matrix"]["reason"] == f"{compiler} failed: no such header"
    compiler.write_text("#!/bin/sh\nexit 3\n")
    assert doctor.kernels()["matrix"]["reason"] == f"{compiler} failed: exit code 3"
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert doctor.kernels()["matrix"] == {
        "works": False,
        "reason": "no C++ compiler found: install g++, or set CXX",
    }
    monkeypatch.setenv("POCKETLLM_COMPILE", "0")
    assert doctor.kernels()["matrix"]["reason"] == "POCKETLLM_COMPILE=0 is set"


def test_a_cache_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("POCKETLLM_CACHE", str(tmp_path / "file"))
    found = doctor.cache()
    assert not found["works"] and "point POCKETLLM_CACHE at" in found["reason"]
    compiler = library.find_compiler()
    if compiler is not None:
        assert "file" in doctor.kernels()["nearest"]["reason"]
    monkeypatch.setenv("POCKETLLM_CACHE", str(tmp_path))
    assert doctor.cache()["bytes"] == len("not a folder")


def test_extras(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "EXTRAS", {"absent_module": "pip install it", "torch": ""})
    found = doctor.extras()
    assert found["absent_module"]["reason"] == "not installed; pip install it"
    assert found["torch"]["works"] and found["torch"]["version"] == importlib.metadata.version("torch")


def test_the_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(pocketllm_startup.OFF, raising=False)
    monkeypatch.setattr(pocketllm_startup, "started", True)
    assert doctor.startup_hook() == {"works": True, "reason": ""}
    monkeypatch.setattr(pocketllm_startup, "started", False)
    assert "pocketllm_startup.pth is in no site-packages" in doctor.startup_hook()["reason"]
    monkeypatch.setenv(pocketllm_startup.OFF, "1")
    assert doctor.startup_hook()["reason"] == "POCKETLLM_NO_HOOK=1 is set"


def test_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, total_memory = "GPU", 8_000_000_000

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda n: Properties())
    assert doctor.gpus() == [{"name": "GPU", "memory_bytes": 8_000_000_000}]
    monkeypatch.setattr(doctor, "_installed", lambda name: False)
    assert doctor.kernels()["triton"]["reason"].startswith("not installed")


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc/cpuinfo")
def test_features_of_the_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "model name\t: X\nflags\t\t: fpu avx2 avx512_vnni\n"
    monkeypatch.setattr(Path, "read_text", lambda self, **options: text)
    found = machine.processor_features()
    assert found is not None and {name for name, there in found.items() if there} == {"avx2", "avx512_vnni"}
    monkeypatch.setattr(Path, "is_file", lambda self: False)
    assert machine.processor_features() is None
