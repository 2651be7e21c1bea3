"""The kernels in Triton: what they compute, in Triton's interpreter, and what happens where one fails."""

from __future__ import annotations

import importlib.util
import os
import runpy
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pocketllm.codec.index_form import Trellis
from pocketllm.codec.kernels import reference, select
from pocketllm.codec.kernels.packed_op import packed_matmul
from pocketllm.codec.kernels.packed_product import PackedProduct
from pocketllm.codec.kernels.reference import PathProblem
from tests.packed_weights import on_hashed_trellis

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="no Triton; it comes with CUDA builds of torch"
)


@needs_triton
def test_in_the_interpreter() -> None:
    """In a process of its own: see interpreted/conftest.py."""
    options = ["-n", "0", "-q", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", *options, str(ROOT / "tests" / "interpreted")]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_triton
def test_compiled(tmp_path: Path) -> None:
    """No GPU is needed for that, only Triton; also in a process of its own, since it must not be interpreted there."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.interpreted.compile_for_gpu"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_benchmark_needs_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its dry run is in interpreted/test_gpu_runtime.py."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    monkeypatch.setattr(sys, "argv", ["gpu_runtime.py"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "benchmarks" / "gpu_runtime.py"), run_name="__main__")
    assert str(ended.value.code).startswith("gpu_runtime.py needs a GPU, and torch sees none")


def test_another_search_is_tried_first(caplog: pytest.LogCaptureFixture) -> None:
    def broken(problem: PathProblem) -> torch.Tensor:
        raise RuntimeError("no such instruction")

    assert not select._agrees("Triton", partial(select.paths_differ, broken), CPU)
    assert "the Triton kernel is not used on cpu (no such instruction)" in caplog.text
    assert (
        select.paths_differ(lambda p: reference.cheapest_paths(p) + 1, CPU) == "its paths differ from torch's"
    )
    assert select.paths_differ(reference.cheapest_paths, CPU) == ""


GPU = torch.device("cuda")


@pytest.fixture
def _no_choice_made() -> Iterator[None]:
    """No kernel for products on a GPU has been chosen yet, and none will have been afterwards."""
    select.packed_gpu.cache_clear()
    yield
    select.packed_gpu.cache_clear()


@pytest.mark.usefixtures("_no_choice_made")
def test_products_on_a_gpu_are_used_where_they_import_and_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("packed_gpu")
    monkeypatch.setattr(importlib, "import_module", lambda name: module)
    for agrees, why in ((True, ""), (False, "there are no kernels: Triton is not installed")):
        monkeypatch.setattr(select, "_agrees", lambda *case, agrees=agrees: agrees)
        select.packed_gpu.cache_clear()
        assert (select.packed_gpu(GPU) is module) == agrees
        assert select.no_packed_kernels(GPU).startswith(why) and bool(why) != agrees


@pytest.mark.usefixtures("_no_choice_made")
def test_products_on_a_gpu_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ModuleType:
        raise ImportError("no module named triton")

    monkeypatch.setattr(importlib, "import_module", missing)
    assert select.packed_gpu(GPU) is None
    assert "Triton is not installed" in select.no_packed_kernels(GPU)


def test_why_there_are_no_products_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert select.packed_gpu(CPU) is None
    assert select.no_packed_kernels(torch.device("mps")) == "there are no kernels for mps"
    monkeypatch.setattr(select, "packed_isa", lambda: None)
    assert "no C++ compiler was found" in select.no_packed_kernels(CPU)


def test_entries_of_a_hashed_trellis_stand_for_its_full_table() -> None:
    """On a GPU the 256 entries are kept; a CPU takes them as well."""
    torch.manual_seed(0)
    trellis = Trellis(12, 3, strip_rows=16)
    weight = on_hashed_trellis(37, 51, trellis, 2, banded=False, entries=True)
    plain, x = weight.in_stream_order(), torch.randn(2, 51)
    assert weight.is_hashed and not plain.is_hashed and plain.table.shape == (1 << 12, 2)
    assert torch.equal(packed_matmul(x, weight), packed_matmul(x, plain))
    rows = torch.tensor([0, 36])
    assert torch.equal(weight.indices_of(rows), plain.indices()[rows].long())
    assert torch.equal(PackedProduct(weight).linear(x), PackedProduct(plain).linear(x))
