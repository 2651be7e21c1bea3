"""`compress --max-memory`: the limit is kept, the bytes are the same, and what cannot be kept is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pocketllm
from pocketllm.compression import compress_job
from pocketllm.compression.memory_plan import MemoryPlan
from tests import tiny
from tests.commands import Run, contents

KEPT = """
import json, re, sys
from dataclasses import replace
from pathlib import Path
import pocketllm
from pocketllm.compression import compress_job
from tests import tiny

found, plan_memory = {}, compress_job.plan_memory

def plan_below(source, plan, windows, held):
    def limited(gb):
        return plan_memory(source, replace(plan, config=replace(plan.config, max_memory_gb=gb)), windows, held)

    free = limited(None).peak
    made = limited((free - 1e6) / 1e9)
    found.update(free=free, limit=made.peak, on_disk=made.on_disk)
    return made

compress_job.plan_memory = plan_below
calibration = {"tokens": 1 << 16, "context": 512}
config = tiny.on_trellis(2.0, keep_embeddings=True, calibration=calibration, codec={"trellis_width": 4})
pocketllm.compress(sys.argv[1], replace(config, max_memory_gb=1.0), sys.argv[2])
found["peak"] = int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
print(json.dumps(found))
"""


@pytest.mark.large  # half a minute, with a process of its own
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="the peak is read from /proc")
def test_the_limit_is_kept(tmp_path: Path) -> None:
    """Twice the activations of all windows are 134 MB: in memory, they would exceed the limit (by 15 MB, measured)."""
    source = tiny.save(tmp_path / "dense", hidden_size=256, num_hidden_layers=1, max_position_embeddings=512)
    command = [sys.executable, "-c", KEPT, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert found["on_disk"] and found["limit"] < found["free"]
    assert found["peak"] <= found["limit"]


@pytest.mark.parametrize(("sequential", "threads"), [(True, 2), (False, 1)])  # two matrices at once, or one
def test_the_bytes_do_not_depend_on_the_limit(
    source: Path, tmp_path: Path, sequential: bool, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, config = torch.get_num_threads(), tiny.on_trellis(calibration={"sequential": sequential})
    torch.set_num_threads(threads)
    try:
        for name, plan in (("free", MemoryPlan()), ("limited", MemoryPlan(True, 1))):
            monkeypatch.setattr(compress_job, "plan_memory", lambda *given, plan=plan: plan)
            pocketllm.compress(
                source, config, tmp_path / name, calibration_folder=tmp_path / f"{name}-measured"
            )
    finally:
        torch.set_num_threads(before)
    assert contents(tmp_path / "free") == contents(tmp_path / "limited")
    measured = [
        sorted((tmp_path / f"{name}-measured").rglob("*.safetensors")) for name in ("free", "limited")
    ]
    assert [path.read_bytes() for path in measured[0]] == [path.read_bytes() for path in measured[1]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("0", "max_memory_gb: got 0.0, wanted more than 0"),
        ("-1GB", "--max-memory: got '-1GB', wanted bytes, such as"),
        ("abc", "--max-memory: got 'abc', wanted bytes, such as"),
        ("10MB", "max_memory_gb: got 0.01, wanted at least"),
    ],
)
def test_wrong_limits(run: Run, source: Path, tmp_path: Path, given: str, message: str) -> None:
    code, _, error = run(
        "compress", str(source), "-o", str(tmp_path / "out"), "--bpw", "6", "--max-memory", given
    )
    assert code == 2 and message in " ".join(error.split())
    assert not list(tmp_path.iterdir())


def test_options_that_exclude_each_other(run: Run, source: Path, tmp_path: Path) -> None:
    command = ["compress", str(source), "-o", str(tmp_path / "out"), "--max-memory", "4GB"]
    code, _, error = run(*command, "--ppl", str(source / "config.json"))
    assert code == 2 and "--ppl: --max-memory applies to compressing only" in " ".join(error.split())
    code, _, error = run(*command, "--no-calibration")
    assert code == 2 and "max_memory_gb: got no calibration" in " ".join(error.split())
    code, _, error = run(*command[:-2], "--set", "max_memory_gb=4")
    assert code == 2 and "--set max_memory_gb: use the option --max-memory" in " ".join(error.split())


def test_a_dry_run_predicts_the_peak(run: Run, source: Path, tmp_path: Path) -> None:
    command = ["compress", str(source), "-o", str(tmp_path / "out"), "--dry-run", "--bpw", "6"]
    command += ["--max-memory", "100GB", "--set", "calibration.tokens=512", "--set", "calibration.context=32"]
    code, out, _ = run(*command)
    assert code == 0 and "peak memory, predicted" in out
