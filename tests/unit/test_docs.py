"""The tables in the docs are those of the committed results; links between the docs lead somewhere."""

from __future__ import annotations

import dataclasses
import json
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pocketllm.config import DEFAULT_PRESET, PRESETS
from pocketllm.format.report import MatrixReport, Report
from pocketllm.studies import STUDIES

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])


@pytest.mark.parametrize("maker", ["tables.py", "studies.py", "api.py"])
def test_pages_match_the_results(
    maker: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `python benchmarks/MAKER --check`, in this process, which has imported most of it already."""
    path = str(ROOT / "benchmarks" / maker)
    monkeypatch.setattr(sys, "argv", [path, "--check"])
    monkeypatch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(path, run_name="__main__")
    assert not ended.value.code, capsys.readouterr().out


@pytest.mark.parametrize("name", STUDIES)
def test_every_study_is_there_in_full(name: str) -> None:
    result = json.loads((ROOT / "docs" / "studies" / name / "result.json").read_text(encoding="utf-8"))
    assert result["study"] == name and result["config"]["quick"] is False
    assert f"-o docs/studies/{name} --threads {result['config']['threads']}" in result["command"]
    assert result["step_seconds"].keys() == result["results"].keys()
    assert {"torch", "pocketllm-codec", "python"} <= result["machine"]["versions"].keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_preset_is_documented() -> None:
    """And the default is called that, in one place."""
    text = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    assert [name for name in PRESETS if f"`{name}`" not in text] == []
    assert re.findall(r"`([^`]+)` \(default\)", text) == [DEFAULT_PRESET]


def test_the_report_keys_of_the_format_are_those_that_are_checked() -> None:
    section = (ROOT / "FORMAT.md").read_text(encoding="utf-8").split("## `pocketllm.json`")[1]
    for start, cls in (("- for the model:", Report), ("- in each entry of `matrices`", MatrixReport)):
        line = section.split(start)[1].split(";")[0].split("(")[0]
        always = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
        # Lists of the model have lines of their own.
        assert set(re.findall("`([a-z0-9_]+)`", line)) == always - {"matrices", "skipped"}


def test_continuous_integration_runs_what_contributing_says() -> None:
    """The commands of CONTRIBUTING.md are those of `.ci/run`, which takes the last two from README.md."""
    said = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Check")[1].split("```")[1]
    commands = [line for line in said.splitlines() if line.startswith(".venv/")]
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert all(command in script for command in commands[:3])
    blocks = re.findall(r"```bash\n(.*?)\n```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    for command, block in zip(commands[3:], blocks[:2], strict=True):
        assert command in block


def test_results_name_no_place_on_a_machine() -> None:
    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict | list):
            for part in value.values() if isinstance(value, dict) else value:
                yield from texts(part)

    files = [
        *(ROOT / "benchmarks" / "results").glob("*.json"),
        *(ROOT / "docs").glob("studies/*/result.json"),
    ]
    assert len(files) > 40
    for file in files:
        found = json.loads(file.read_text(encoding="utf-8"))
        assert not [text for text in texts(found) if text.startswith("/")], file
