"""The studies of error over bits (overfit, codebook): every bit is counted, findings follow from the results."""

from __future__ import annotations

import math

import pytest
import torch

from pocketllm.studies import load
from pocketllm.studies.measure import overfit_steps
from tests.studies import CodecStudies

# overfit


def test_overfit_knows_quantized_weights() -> None:
    levels = torch.arange(16.0)
    weight = levels[torch.randint(16, (8, 64), generator=torch.Generator().manual_seed(0))]
    assert 10 < overfit_steps._levels(weight) <= 16
    assert overfit_steps._levels(torch.randn(8, 64)) == 32


def test_overfit_knows_what_rounding_costs() -> None:
    weight = torch.randn(100_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))[None]
    measured = float((weight - weight.bfloat16().double()).square().mean())
    assert overfit_steps._rounding(weight.float()) == pytest.approx(measured, rel=0.02)


def test_overfit_points_are_coded_as_they_say(codec_studies: CodecStudies) -> None:
    results = codec_studies.results("overfit")
    for key in ("sweep.4x16", "sweep.1x16"):
        point = results[key]
        assert point["index_bpw"] == pytest.approx(math.log2(point["codebook_size"]) / point["vector_len"])
        assert point["bpw"] > point["index_bpw"] and point["bits"]["row_scales"] == 0
        assert point["bound_mse"] < point["mse"]
        assert point["mse"] == pytest.approx(point["kmeans_mse"], rel=0.2)
    assert results["sweep.1x1024"]["mse"] < 1e-2 * results["sweep.1x16"]["mse"]
    assert results["twin.4x16"]["mse"] > results["twin.4x16"]["bound_mse"]


def test_overfit_says_where_the_target_is_reached(codec_studies: CodecStudies) -> None:
    results = codec_studies.results("overfit")
    points = [value for key, value in results.items() if key.startswith("sweep.")]
    for point in points:
        point["mse"] = 1e-2
    assert load("overfit").findings(results)[0].startswith("Did not hold here. ")
    points[0] |= {"mse": 1e-5, "bpw": 5.0, "index_bpw": 4.5}
    first = load("overfit").findings(results)[0]
    assert (
        first.startswith("Held with enough codewords, not at the paper's 2 bits")
        and "from 4.50 bits" in first
    )
    points[0]["bpw"] = 1.9
    assert load("overfit").findings(results)[0].startswith("Held. ")


def test_overfit_counts_all_bits_where_it_looks_at_the_bound(codec_studies: CodecStudies) -> None:
    results = codec_studies.results("overfit")
    for value in (value for key, value in results.items() if key.startswith("sweep.")):
        value |= {"mse": 1.0, "bound_mse": 0.5, "bpw": 2.0}
    bound, point = results["bound"], results["sweep.4x16"]
    bound |= {"bits": [1.0, 2.0, 3.0], "mse": [0.25, 0.0625, 0.015625], "distinct_values": 16}
    point |= {"mse": 0.1, "bound_mse": 0.2, "index_bpw": 1.0, "bpw": 1.5}
    words = " ".join(load("overfit").findings(results))
    assert "All bits counted, 1 of 4 codes pass the bound" in words and "each of the 16 different" in words
    point["bpw"] = 2.5
    words = " ".join(load("overfit").findings(results))
    assert "All bits counted, 0 of 4 codes pass the bound for Gaussian rows." in words
    assert "At the bits of the indices alone (d = 4, K = 16; 1.00 bits of indices, 2.50 in all)" in words
    row = next(r for r in load("overfit").tables(results)[2].rows if r[:2] == ["4", "16"])
    assert row[-2:] == ["0.50", f"{0.1 / 2**-5:.2f}"]
    point["bpw"] = 5.0  # past the rates whose bound was kept
    row = next(r for r in load("overfit").tables(results)[2].rows if r[:2] == ["4", "16"])
    assert row[-1] == f"{0.1 * 4**5:.2f}"


# codebook


def test_codebook_counts_every_bit(codec_studies: CodecStudies) -> None:
    results = codec_studies.results("codebook")
    point = results["grid.4x256"]
    weights = point["matrix"]["rows"] * point["matrix"]["columns"]
    assert point["shared_by"] == 2
    assert point["bpw_alone"] == pytest.approx(sum(point["bits"].values()) / weights)
    common = point["bits"]["codebook"] + point["bits"]["decoder"]
    assert point["bpw_alone"] - point["bpw_shared"] == pytest.approx(common / 2 / weights)
    assert point["nmse"] <= 1.001 * point["kmeans_nmse"]


def test_codebook_measures_whole_models(codec_studies: CodecStudies) -> None:
    results = codec_studies.results("codebook")
    dense, coded = results["model.dense"], results["model.2x16"]
    assert dense["text"] == coded["text"] == "Python's own documentation (held-out topics)"
    assert codec_studies["codebook"].result["config"]["texts"].keys() == {dense["text"]}
    assert coded["perplexity"] != dense["perplexity"] and coded["tokens"] == dense["tokens"]
    assert coded["bpw"] > 2 and 0 < coded["nmse"] < 1


def test_codebook_says_where_it_is_concise(codec_studies: CodecStudies) -> None:
    results = codec_studies.results("codebook")
    first = load("codebook").findings(results)[0]
    assert first.startswith("Held at the paper's size, which is a matter of counting: ")
    assert "0.093 bits per weight beside 1.875 of indices, 1.97 with the row scales" in first
    assert "it did not hold, shared or not: at d = 4, K = 256" in first
    point = results["grid.4x256"]
    scales = 16 / point["matrix"]["columns"]
    point["bpw_shared"] = point["index_bpw"] + scales + 0.01
    assert "it held only where matrices share a codebook: " in load("codebook").findings(results)[0]
    point["bpw_alone"] = point["bpw_shared"]
    assert "it held, too: " in load("codebook").findings(results)[0]
