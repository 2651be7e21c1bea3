"""benchmarks/gpu_runtime.py on tiny matrices: what it writes is complete and agrees with the reference."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def test_a_dry_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "path", [str(BENCHMARKS), *sys.path])
    monkeypatch.setattr(sys, "argv", ["gpu_runtime.py", "--dry-run"])
    runpy.run_path(str(BENCHMARKS / "gpu_runtime.py"), run_name="__main__")
    found = json.loads(capsys.readouterr().out)
    assert len(found["runs"]) == 2 * 5 * 2 and len(found["blocks"]) == 5 * 2
    for run in found["runs"]:
        assert run["relative_error"] < 1e-5 and set(run["seconds"]) == {"packed", "stream", "decoded"}
        assert run["bandwidth_share"] > 0 and run["dense_seconds"] > 0
    for block in found["blocks"]:
        some = [r for r in found["runs"] if all(r[key] == block[key] for key in ("form", "bits", "tokens"))]
        assert block["seconds"] == pytest.approx(sum(r["in_block"] * r["seconds"]["packed"] for r in some))
