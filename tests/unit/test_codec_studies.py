"""The studies of the codec on a tiny model: what each writes, and how the small version differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pocketllm.studies import load
from pocketllm.studies.measure import trials
from tests.studies import CODEC_SIZES, CodecStudies, setup_of


@pytest.mark.parametrize("name", CODEC_SIZES)
def test_writes_page_and_pictures(codec_studies: CodecStudies, name: str) -> None:
    outcome = codec_studies[name]
    page = (outcome.output / f"{name}.md").read_text()
    assert all(sentence in page for sentence in outcome.result["findings"])
    assert all(table.title in page and table.rows for table in load(name).tables(outcome.result["results"]))
    assert (outcome.output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    drawn = (outcome.output / f"{name}.svg").read_text()
    assert "</svg>" in drawn and "mathdefault" not in drawn
    json.dumps(outcome.result, allow_nan=False)


@pytest.mark.parametrize("name", CODEC_SIZES)
def test_the_full_version_is_larger(
    codec_studies: CodecStudies, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        trials, "_check_size", lambda *sizes: None
    )  # its codebooks are too large for this model
    small, full = (
        [s.key for s in load(name).measurement.steps(setup_of(codec_studies.model, tmp_path, quick))]
        for quick in (True, False)
    )
    assert len(set(full)) == len(full)
    assert len(full) > len(small) or name == "utilization"
