"""Gather what was measured into benchmarks/results/peers.json, or the paired runs into peers_paired.json.

python benchmarks/peers/report.py peers MODEL FOLDER
python benchmarks/peers/report.py paired MODEL FOLDER
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from environments import CMAKE_OPTIONS
from settings import PAIRED, SETTINGS, Setting

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import CONTEXT, RESULTS, SMOLLM2, SUBJECTS, Subject, save

COMMAND = "python benchmarks/peers/run.py"


def entry(work: Path, setting: Setting) -> dict[str, Any]:
    """Everything known of one setting; of one that failed, the end of its log."""
    values: dict[str, Any] = dataclasses.asdict(setting)
    if not (work / "evaluation.json").is_file():
        return {**values, "failure": (work / "failure.txt").read_text(encoding="utf-8")}
    cost, bits = _read(work / "cost.json"), _read(work / "bits.json")
    del cost["versions"]
    return {
        **values,
        **_read(work / "evaluation.json"),
        **bits,
        **cost,
        "as_run": _read(work / "settings.json"),
    }


def peers(subject: Subject, root: Path) -> None:
    """All settings, done or failed, in the order of SETTINGS.

    Those that were not run here keep their committed results, if model and calibration are the same.
    """
    facts = _read(root / "calibration" / "facts.json")
    results = RESULTS / f"{subject.results('peers')}.json"
    before = _read(results) if results.is_file() else {}
    calibration = {key: facts[key] for key in facts if key.startswith(("calibration", "seed"))}
    if before.get("model_sha256") != facts["model_sha256"] or before.get("calibration") != calibration:
        before = {}
    found, environments = {}, before.get("environments", {})
    for setting in SETTINGS:
        work = root / "runs" / setting.name
        if (work / "evaluation.json").is_file() or (work / "failure.txt").is_file():
            found[setting.name] = entry(work, setting)
        elif setting.name in before.get("settings", {}):
            found[setting.name] = before["settings"][setting.name]
        if (work / "cost.json").is_file():
            environments[setting.peer] = _read(work / "cost.json")["versions"]
    values = {
        "model": subject.source,
        "model_sha256": facts["model_sha256"],
        "text": "WikiText-2 raw test",
        "context": CONTEXT,
        "windows": subject.windows,
        "dtype": "bfloat16",
        "calibration": calibration,
        "llamacpp_build": {
            "sources": _sources(root) or before.get("llamacpp_build", {}).get("sources"),
            "cmake_options": CMAKE_OPTIONS,
        },
        "dense": _read(root / "calibration" / "dense.json"),
        "settings": found,
        "environments": environments,
    }
    save(subject.results("peers"), _command(subject), values)


def paired(subject: Subject, root: Path) -> None:
    """Medians of the paired runs, and ours over the peer's."""
    runs = _read(root / "paired.json")
    keys = ("seconds", "cpu_seconds", "peak_mib")
    medians = {
        name: {key: statistics.median(r[key] for r in runs if r["setting"] == name) for key in keys}
        for name in PAIRED
    }
    peer, ours = (medians[name] for name in PAIRED)
    ratios = {key: ours[key] / peer[key] for key in keys}
    repeats = len(runs) // len(PAIRED)
    values = {"model": subject.source, "repeats": repeats, "medians": medians, "ratios": ratios, "runs": runs}
    save(subject.results("peers_paired"), f"{_command(subject)} --paired {repeats}", values)
    print(json.dumps({"medians": medians, "ratios": ratios}, indent=1))


def _command(subject: Subject) -> str:
    return COMMAND if subject is SMOLLM2 else f"{COMMAND} --model {subject.name}"


def _sources(root: Path) -> dict[str, str] | None:
    """The archive that llama.cpp was built from, as some job names it."""
    for path in (root / "runs").glob("llamacpp-*/job.json"):
        options = _read(path)["options"]
        return {key: options[key] for key in ("archive", "sha256")}
    return None


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


if __name__ == "__main__":
    {"peers": peers, "paired": paired}[sys.argv[1]](SUBJECTS[sys.argv[2]], Path(sys.argv[3]))
