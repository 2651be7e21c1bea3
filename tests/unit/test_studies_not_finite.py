"""Pages and pictures of results in which something is not finite, or missing: nothing measured is lost by it.

Each edits the results that the documentation shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from pocketllm.studies import load

DOCS = Path(__file__).parents[2] / "docs" / "studies"


def results_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((DOCS / name / "result.json").read_text())["results"]
    return found


def findings_of(name: str, results: dict[str, Any]) -> list[str]:
    """The findings, once tables and picture are made; no word of them comes from a missing number."""
    study = load(name)
    study.draw(results, Figure(layout="constrained"))
    cells = [cell for table in study.tables(results) for row in table.rows for cell in row]
    found = study.findings(results)
    assert not [text for text in (*cells, *found) if "None" in text or "; ." in text or ": ." in text]
    assert not {"nan", "inf"} & {word for text in (*cells, *found) for word in text.split()}
    return found


def test_the_dense_model() -> None:
    results = results_of("codebook")
    results["model.dense"]["perplexity"] = None
    assert any("dense not finite" in sentence for sentence in findings_of("codebook", results))
    for key in results:
        if key.startswith("model."):
            results[key]["perplexity"] = None
    findings_of("codebook", results)
    results = results_of("sensitivity")
    for values in results.values():
        if "dense" in values:
            values["dense"] = None
    findings_of("sensitivity", results)


@pytest.mark.parametrize("part", ["everything", "FFN", "embedding and head"])
def test_the_loss_of_a_part(part: str) -> None:
    results = results_of("sensitivity")
    results["plain-parts"]["groups"][part] |= {"kl": None, "kl_stderr": None, "perplexity": None}
    found = findings_of("sensitivity", results)
    assert any(f"not finite with these compressed: {part}." in sentence for sentence in found)
    assert any(sentence.startswith("Calibrated, at") for sentence in found)


def test_the_loss_of_a_block() -> None:
    results = results_of("sensitivity")
    results["plain-blocks"]["groups"]["3"] |= {"kl": None, "kl_stderr": None, "perplexity": None}
    assert findings_of("sensitivity", results)[0].startswith("Blocks: nothing is compared")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("key", ["none-kind", "row-kind", "mlp-matrix", "calibrated-mlp"])
def test_the_divergence_of_a_decoder(key: str, when: str) -> None:
    results = results_of("decoder")
    results[key][when] |= {"kl": None, "kl_stderr": None, "perplexity": None}
    found = findings_of("decoder", results)
    assert any("the KL is not finite" in sentence for sentence in found) is (key == "none-kind")


def test_decoders_that_are_missing() -> None:
    results = results_of("decoder")
    findings_of("decoder", {key: results[key] for key in results if key != "mlp-matrix"})
    assert findings_of("decoder", {"none-kind": results["none-kind"]})[0].startswith(
        "Did not hold here: no decoder"
    )


def test_trainings_of_a_size_that_all_broke_off() -> None:
    results = results_of("rln")
    for key, values in results.items():
        if key.startswith("size."):
            values["end_nmse"] = [None] * len(values["end_nmse"])
    assert any("none beyond noise at K = 64" in sentence for sentence in findings_of("rln", results))


def test_a_training_that_ends_in_no_number() -> None:
    results = results_of("overfit")
    curve = results["curve.published.8x4096"]
    curve["mse_over_epochs"][-1], curve["unfinished"] = None, True
    findings_of("overfit", results)
