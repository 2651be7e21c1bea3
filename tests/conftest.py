"""Settings that every test runs under: one thread, the same random numbers each time; and common fixtures.

Two processes share the tests, file by file (pytest-xdist).
"""

from __future__ import annotations

import gc
import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of what tests start, too

import random
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import settings

import pocketllm
from pocketllm.text import windows
from tests import tiny
from tests.commands import Run

if TYPE_CHECKING:
    from tests.studies import CodecStudies, Counting

torch.set_num_threads(1)
os.fsync = os.fstat  # nothing that a test writes has to survive a power cut; it took a tenth of the time
gc.set_threshold(50_000, 20, 100)  # as much again: most objects are those of imported modules
settings.register_profile("ci", derandomize=True)  # the same examples at every run of CI
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Each test starts from the same random state, whichever tests ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _long_texts_are_tokenized_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text that calibration takes by default has 0.4 MB, and most tests take it: its tokens are kept."""
    original = windows.tokenize

    def tokenize(tokenizer: Any, text: str) -> torch.Tensor:
        if len(text) < 100_000 or not getattr(tokenizer, "is_fast", False):
            return original(tokenizer, text)
        key = (tokenizer.backend_tokenizer.to_str(), text)
        if key not in _TOKENS:
            _TOKENS[key] = original(tokenizer, text)
        return _TOKENS[key].clone()

    monkeypatch.setattr(windows, "tokenize", tokenize)


_TOKENS: dict[tuple[str, str], torch.Tensor] = {}


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(capsys, monkeypatch)


@pytest.fixture(scope="module")
def model() -> Any:
    """A tiny dense model in memory."""
    return tiny.model()


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Its tokenizer."""
    return tiny.tokenizer()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny dense model."""
    return tiny.save(tmp_path_factory.mktemp("model") / "dense")


@pytest.fixture(scope="module")
def small(source: Path) -> Path:
    """The same, compressed; beside it."""
    pocketllm.compress(source, tiny.settings(), source.parent / "small")
    return source.parent / "small"


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    """One that a test may damage."""
    shutil.copytree(small, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture(scope="module")
def text(source: Path) -> Path:
    """A text of some windows."""
    path = source.parent / "text.txt"
    path.write_text("a text that is long enough for some windows. " * 20, encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def codec_studies(tmp_path_factory: pytest.TempPathFactory) -> CodecStudies:
    """The studies of the codec, run small on a tiny model."""
    from tests.studies import CodecStudies, small_codec_model

    return CodecStudies(small_codec_model(tmp_path_factory), tmp_path_factory.mktemp("studies-done"))


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> Counting:
    """The study `counting`, which notes what it ran."""
    from pocketllm.studies import STUDIES
    from tests.studies import Counting

    made = Counting()
    monkeypatch.setitem(STUDIES, "counting", "steps are counted")
    monkeypatch.setattr("pocketllm.studies.runner.load", lambda name: made.study())
    return made
