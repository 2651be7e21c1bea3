"""The loss that plans count on, against what was measured on real models (benchmarks/predicted_loss.py)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
_WITHIN = 1.5


@pytest.mark.parametrize("model", ["smollm2-135m", "gemma-3-270m"])
def test_predicted_loss_is_near_the_measured_one(model: str) -> None:
    found = json.loads((RESULTS / f"predicted_{model}.json").read_text(encoding="utf-8"))
    for part in ("ends", "blocks"):
        ratio = found["kl"][part] / found["predicted"][part]
        assert found["ratio"][part] == pytest.approx(ratio)
        assert 1 / _WITHIN < ratio < _WITHIN, (model, part, ratio)
