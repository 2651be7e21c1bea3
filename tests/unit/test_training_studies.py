"""The studies that look inside training (rln, depth, utilization): trained is what they say, findings follow."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from pocketllm.studies import load
from pocketllm.studies.measure import trials, utilization_steps
from pocketllm.studies.measure.entries import exploded
from tests.studies import CODEC_SIZES, CodecStudies, setup_of

# rln


def test_rln_has_every_norm_kind_and_training(codec_studies: CodecStudies) -> None:
    results = codec_studies.results("rln")
    kinds = [key.split(".", 2)[2] for key in results if key.startswith("published.rln.")]
    assert len(kinds) == 3
    for training in trials.TRAININGS:
        for norm in trials.NORMS:
            assert [key for key in results if key.startswith(f"{training}.{norm}.")] == [
                f"{training}.{norm}.{kind}" for kind in kinds
            ]
    entry = results[f"published.ln.{kinds[0]}"]
    assert entry["settings"]["norm"] == "ln" and entry["settings"]["learning_rate"] == 1.6e-2
    assert entry["settings"]["max_grad_norm"] is None  # infinite: not cut
    assert entry["gradient"]["high"][0] >= entry["gradient"]["low"][0] > 0
    assert entry["peak_gradient"][0] == max(entry["peak_gradient"][0], entry["last_gradient"][0])


def test_rln_says_what_exploded(codec_studies: CodecStudies) -> None:
    results = codec_studies.results("rln")
    entries = [value for key, value in results.items() if key.startswith("published.ln.")]
    for entry in entries:
        entry["peak_gradient"] = [11 * first for first in entry["first_gradient"]]
    assert exploded(entries) == (6, 6)
    for key, entry in results.items():
        if key.startswith("published.rln."):
            entry["peak_gradient"] = entry["first_gradient"]
        entry["end_nmse"] = [0.4, 0.5]
    for key, entry in results.items():
        if key.startswith("published.ln."):
            entry["end_nmse"] = [0.4, 0.6]
    assert load("rln").findings(results)[0].startswith("Held in part: ")
    assert "LayerNorm ends 0.050 higher than RLN, within noise" in load("rln").findings(results)[0]
    assert "6 of 6 with LayerNorm" in load("rln").findings(results)[0]
    for entry in entries:
        entry["peak_gradient"] = entry["first_gradient"]
    assert load("rln").findings(results)[0].startswith("Did not hold here: ")
    for entry in entries:
        entry["end_nmse"] = [0.6, 0.7]
    assert "0.20 higher than RLN, beyond noise" in load("rln").findings(results)[0]
    assert load("rln").findings(results)[0].startswith("Held in part: ")
    entries[0]["end_nmse"][0] = None
    assert exploded(entries) == (1, 6)


def test_rln_counts_where_it_is_better(codec_studies: CodecStudies) -> None:
    results = codec_studies.results("rln")
    for key, entry in results.items():
        entry["end_nmse"] = [0.1 if ".rln." in key else 0.2] * len(entry["end_nmse"])
    assert all("RLN ends below it in 6 of 6" in sentence for sentence in load("rln").findings(results)[1:4])


def test_rln_says_what_was_learned_and_nothing_of_noise(codec_studies: CodecStudies) -> None:
    from matplotlib.figure import Figure

    results = codec_studies.results("rln")
    for key, entry in results.items():
        entry["latent_nmse"] = [1.0, 1.0] if key == "rate.none.0.16" else [0.5, 1.0]
        entry["end_nmse"] = [0.4, 0.6] if ".ln." in key else [0.5, 0.5]
    found = load("rln").findings(results)
    zeros = found[-2].split("Those at which most trainings end no better than zeros: ")[1]
    assert zeros == "RLN at none up to 0.16; LayerNorm at none up to 0.16; no norm at 0.16."
    assert "none beyond noise at K = 16" in found[-1]
    results["size.ln.16"]["end_nmse"] = [0.3, 0.3]
    assert "LayerNorm at K = 16 (" in load("rln").findings(results)[-1]
    for norm in trials.NORMS:
        results[f"size.{norm}.16"]["end_nmse"] = [None, None]
    assert "none beyond noise at K = 16 (RLN not finite" in load("rln").findings(results)[-1]
    load("rln").draw(results, Figure())


# depth


def test_depth_finds_the_gap_and_what_closes_it(codec_studies: CodecStudies) -> None:
    results = codec_studies.results("depth")

    def ends(what: str, by_depth: dict[int, float]) -> None:
        for key, entry in results.items():
            if key.startswith(what):
                entry["end_nmse"] = [by_depth[int(key.split(".")[1])]] * len(entry["end_nmse"])

    ends("published", {1: 0.3, 3: 0.2, 5: 0.4})
    ends("hidden", {1: 0.3, 3: 0.2, 5: 0.4})
    ends("tuned", {1: 0.3, 3: 0.2, 5: 0.2})
    for depth_, end in ((3, 0.3), (5, 0.5)):
        results[f"tuned.{depth_}.1.0.016"]["end_nmse"] = [end, end]
    found = load("depth").findings(results)
    assert found[0].startswith("Held: ") and "right against one held: one block ends 0.10 higher" in found[0]
    assert "five blocks end 0.20 higher" in found[3] and "it is one of optimization" in found[3]
    results["tuned.5.1.0.005"]["end_nmse"] = [0.38, 0.38]
    assert "do not close it" in load("depth").findings(results)[3]
    ends("published", {1: 0.3, 3: 0.2, 5: 0.2})
    assert load("depth").findings(results)[0].startswith("Held in part: ")
    ends("published", {1: 0.1, 3: 0.2, 5: 0.4})
    assert (
        "right against one did not hold: one block ends 0.10 lower, beyond noise"
        in load("depth").findings(results)[0]
    )
    ends("published", {1: 0.1, 3: 0.2, 5: 0.2})
    assert load("depth").findings(results)[0].startswith("Did not hold here: ")
    results["published.5"]["end_nmse"][0] = None
    assert "a training diverged" in load("depth").findings(results)[0]


def test_depth_says_nothing_of_what_noise_would_make(codec_studies: CodecStudies) -> None:
    results = codec_studies.results("depth")
    for key, entry in results.items():
        entry["end_nmse"] = [0.4, 0.8] if key.split(".")[1] == "5" else [0.4, 0.5]
    found = load("depth").findings(results)
    assert found[0].startswith("Undecided here: ") and "within noise" in found[0]
    assert "whether tuning closes a gap, these trainings cannot say" in found[3]
    for key in ("tuned.5.1.0.016", "tuned.3.1.0.016"):
        results[key]["end_nmse"] = [1.0, 1.0] if ".5." in key else [0.6, 0.6]
    assert "whether tuning closes it, these trainings cannot say" in load("depth").findings(results)[3]
    assert "the highest rate tried at that length" not in load("depth").findings(results)[3]
    results["tuned.3.1.0.016"]["end_nmse"] = [0.3, 0.3]
    assert "the highest rate tried at that length" in load("depth").findings(results)[3]


def test_depth_trains_what_it_says(codec_studies: CodecStudies) -> None:
    results = codec_studies.results("depth")
    for key, entry in results.items():
        assert entry["settings"]["depth"] == int(key.split(".")[1])
        assert entry["settings"]["init"] == ("kmeans" if key.startswith("ours") else "normal")
        assert math.isinf(entry["settings"]["max_grad_norm"] or math.inf) is key.startswith("published")
    assert {results[key]["settings"]["hidden"] for key in results if key.startswith("hidden")} == {16, 64}


# utilization


def test_utilization_counts_use(codec_studies: CodecStudies) -> None:
    results = codec_studies.results("utilization")
    entry = results["published"]
    assert list(entry["use_by_rank"]) == ["1", "2"] and entry["ranks"][0] == 1 and entry["ranks"][-1] == 16
    assert entry["coded_use_by_rank"] == sorted(entry["coded_use_by_rank"], reverse=True)
    assert results["ours"]["trained_used"][0] == 1.0
    assert results["collapse-norm"]["settings"]["norm"] == "none"
    assert results["revived"]["settings"]["revive"] and not entry["settings"]["revive"]


def test_utilization_tells_of_every_part_of_a_training(
    codec_studies: CodecStudies, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for size, value in CODEC_SIZES["utilization"].items():
        monkeypatch.setattr(utilization_steps, size, value)
    told: list[float] = []
    load("utilization").measurement.steps(setup_of(codec_studies.model, tmp_path))[0].run(told.append)
    assert told == sorted(told) and told[-1] == 1.0 and any(0 < share < 0.5 for share in told)


def test_utilization_by_rank() -> None:
    counts = torch.tensor([0, 6, 1, 1])
    assert utilization_steps._by_rank(counts) == [3.0, 0.5, 0.5, 0.0]


def test_utilization_says_what_collapsed(codec_studies: CodecStudies) -> None:
    results = codec_studies.results("utilization")
    results["published"]["trained_used"] = [0.5]
    assert load("utilization").findings(results)[0].startswith("Did not hold here, that the published")
    results["published"]["trained_used"] = [1.0]
    assert load("utilization").findings(results)[0].startswith("Held here, that the published start")
    assert (
        "From one seed nothing can be said of noise." in load("utilization").findings(results)[1]
    )  # of one training
    for name, values in {"published": [0.4, 0.5], "ours": [0.2, 0.301]}.items():
        results[name]["nmse"] = values
    for name in ("revived", "guarded"):
        results[name]["nmse"] = [0.3, 0.6]
    assert "beyond noise: k-means and identity." in load("utilization").findings(results)[1]
    results["collapse-rate"]["trained_perplexity"] = [1.5]
    assert "collapsed in 1 of 1" in load("utilization").findings(results)[3]
    results["collapse-rate"]["trained_perplexity"] = [8.0]
    assert "collapsed in 0 of 1" in load("utilization").findings(results)[3]
