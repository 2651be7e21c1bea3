"""`pocketllm compress --bpw 2,3`: the bytes of separate runs, the model measured once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pocketllm.calibrate import calibration
from pocketllm.compression import compress_targets
from pocketllm.compression.progress import Event
from pocketllm.errors import ConfigError, OutputError, TargetError
from tests import tiny
from tests.commands import Run, contents, kill_now, killed

SMALL = [
    "--set",
    "codec.trellis_width=6",
    "--set",
    "calibration.tokens=512",
    "--set",
    "calibration.context=32",
]
SMALL += ["--set", "calibration.sensitivity_tokens=128", "--threads", "1"]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The measurements that are made, with a cache of its own."""
    monkeypatch.setenv("POCKETLLM_CACHE", str(tmp_path / "cache"))
    original, found = calibration.measure, list[int]()

    def measure(*arguments: Any, **settings: Any) -> Any:
        found.append(1)
        return original(*arguments, **settings)

    monkeypatch.setattr(calibration, "measure", measure)
    return found


def test_same_bytes_as_separate_runs(
    run: Run, source: Path, text: Path, measured: list[int], tmp_path: Path
) -> None:
    several = tmp_path / "several"
    words = [*SMALL, "--ppl", str(text), "--context", "16", "--set", "codec.codebook_source=fit"]
    found = run.json("compress", source, "-o", several, "--bpw", "5,6.5", *words)
    assert len(measured) == 1
    assert [Path(target["output"]).name for target in found["targets"]] == ["5", "6.5"]
    assert sorted(path.name for path in several.iterdir()) == ["5", "6.5"]
    for target in found["targets"]:
        bpw = Path(target["output"]).name
        alone = run.json("compress", source, "-o", tmp_path / bpw, "--bpw", bpw, *words)
        assert contents(Path(target["output"])) == contents(tmp_path / bpw)
        same = ("bytes_on_disk", "bpw_matrices", "matrices", "config")
        assert {key: alone[key] for key in same} == {key: target[key] for key in same}
        assert target["measured"]["compressed"]["perplexity"] == alone["measured"]["compressed"]["perplexity"]


def test_plans(run: Run, source: Path, tmp_path: Path) -> None:
    found = run.json(
        "compress", source, "-o", tmp_path / "out", "--bpw", "5,6", "--no-calibration", "--dry-run"
    )
    small, large = (target["bpw_matrices"] for target in found["targets"])
    assert small <= 5 < large <= 6 and all(target["is_plan"] for target in found["targets"])
    assert not (tmp_path / "out").exists()


def test_killed_and_started_again(source: Path, measured: list[int], tmp_path: Path) -> None:
    """What is finished is kept, what is measured too."""
    configs = [tiny.on_trellis(bpw) for bpw in (5.0, 6.0)]

    def progress(event: Event) -> None:
        if event.stage == "encode" and (tmp_path / "out/5").exists():
            kill_now()

    killed(lambda: compress_targets(source, configs, tmp_path / "out", progress=progress))
    before = (tmp_path / "out/5/pocketllm.json").stat().st_mtime_ns
    made = list[str]()
    reports = compress_targets(source, configs, tmp_path / "out", made=lambda name, folder: made.append(name))
    assert made == ["5", "6"] == list(reports) and not measured
    assert (tmp_path / "out/5/pocketllm.json").stat().st_mtime_ns == before
    assert reports["5"].bytes_on_disk < reports["6"].bytes_on_disk
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["5", "6"]


def test_an_impossible_target_is_refused_before_anything_is_made(source: Path, tmp_path: Path) -> None:
    configs = [tiny.on_trellis(bpw) for bpw in (6.0, 0.1)]
    with pytest.raises(TargetError):
        compress_targets(source, configs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_taken_is_refused_before_anything_is_made(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / "6").mkdir(parents=True)
    (tmp_path / "out" / "6" / "mine").write_text("kept")
    configs = [tiny.on_trellis(bpw) for bpw in (5.0, 6.0)]
    with pytest.raises(OutputError, match="out/6: exists and is not"):
        compress_targets(source, configs, tmp_path / "out")
    with pytest.raises(OutputError, match="which must stay unchanged"):
        compress_targets(source, configs, source / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["6"]


def test_targets_that_are_no_list(run: Run, source: Path, tmp_path: Path) -> None:
    for words, reason in (
        (["--bpw", "5,5"], "several targets: got 5 bits per weight twice"),
        (["--bpw", "5,x"], "--bpw: got '5,x', wanted a number, or several as in 2,3,4"),
        (["--bpw", "5,6", "--push", "me/it"], "--push: applies to one target; give one to --bpw"),
        (["--bpw", "5,6", "--recover", "distill"], "--recover: applies to one target"),
    ):
        code, _, err = run("compress", source, "-o", tmp_path / "out", *words, "--no-calibration")
        assert code == 2 and reason in " ".join(err.replace("│", " ").split()), err
    with pytest.raises(ConfigError, match="one that is not in bits per weight"):
        compress_targets(source, [tiny.settings()], tmp_path / "out")
