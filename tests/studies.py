"""A tiny model to study, and a study's setup."""

from __future__ import annotations

from pathlib import Path

import pytest

from pocketllm.studies.study import Setup
from tests import tiny


def small_model(factory: pytest.TempPathFactory) -> str:
    """Folder of a model of three blocks."""
    folder = factory.mktemp("model-studies") / "dense"
    return str(tiny.save(folder, max_position_embeddings=512, num_hidden_layers=3))


def setup_of(model: str, work: Path, quick: bool = True) -> Setup:
    return Setup(model, quick, 0, "cpu", None, work)
