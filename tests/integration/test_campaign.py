"""A small fixed part of the campaign (tests/campaign); docs/reliability.md has the figures of a large one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaign import page

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "benchmarks" / "results" / "reliability.json"


@pytest.mark.skipif(not hasattr(os, "fork") or not Path("/proc/self").exists(), reason="needs Linux")
def test_a_small_campaign(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    path = os.pathsep.join([str(ROOT), str(ROOT / "src")])
    asked = ["--mutations", "30", "--kills", "2", "--faults", "3", "--seed", "1"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.campaign", *asked, "--json", str(tmp_path / "result.json")],
        env={**os.environ, "PYTHONPATH": path},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (tmp_path / "result.json").is_file(), done.stderr
    result = json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))
    assert [part["bad"] for part in result["parts"].values()] == [[], [], []]
    assert sum(result["parts"]["mutations"]["ends"].values()) == 30
    assert done.returncode == 0


def test_the_page_is_that_of_the_committed_result() -> None:
    result = json.loads(RESULT.read_text(encoding="utf-8"))
    written = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    assert written == page.text(result)
    assert "Nothing.\n" in written
    bad = {**result, "parts": {**result["parts"], "kills": {**result["parts"]["kills"]}}}
    bad["parts"]["kills"]["bad"] = [{"number": 7, "job": "merge", "kind": "traceback"}]
    assert "- kills 7: merge, traceback" in page.text(bad) and "1 failed" in page.summary(bad)
