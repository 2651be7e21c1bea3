"""The studies of whole models, on tiny ones: what is compared is what it is said to be."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import pocketllm
from pocketllm.config import CodecConfig
from pocketllm.errors import LoadError
from pocketllm.evaluate.kl import text_divergence
from pocketllm.model.checkpoint import read_report
from pocketllm.model.decode import Matrices
from pocketllm.model.layout import CodebookEntry, DecoderEntry, Layout, MatrixEntry
from pocketllm.model.target import planned
from pocketllm.report.collect import read_model
from pocketllm.studies import (
    codebook,
    decoder,
    overhead,
    overhead_page,
    probe,
    robustness,
    run_study,
    sensitivity,
)
from pocketllm.studies import robustness_page as robust
from pocketllm.studies import sensitivity_page as sensitive
from pocketllm.studies.scored import points_lost
from pocketllm.studies.study import Setup
from pocketllm.studies.whole import dense_model, installed
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(
        tiny.save(
            tmp_path_factory.mktemp("model-studies") / "dense",
            max_position_embeddings=512,
            num_hidden_layers=3,
        )
    )


@pytest.fixture(autouse=True)
def _no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POCKETLLM_DATA", raising=False)


def setup_of(model: str, work: Path, quick: bool = True) -> Setup:
    return Setup(model, quick, 0, "cpu", None, work)


@pytest.mark.parametrize("study", [sensitivity, decoder, overhead, robustness])
def test_steps_of_both_sizes_have_keys_of_their_own(study: Any, model: str, tmp_path: Path) -> None:
    for quick in (True, False):
        keys = [step.key for step in study.STUDY.steps(setup_of(model, tmp_path, quick))]
        assert len(set(keys)) == len(keys) > 1


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model of 64 positions, fewer than any study's windows have tokens."""
    folder = tmp_path_factory.mktemp("short") / "dense"
    return str(tiny.save(folder, max_position_embeddings=64, num_hidden_layers=3))


@pytest.mark.parametrize("study", ["sensitivity", "decoder", "robustness", "overhead"])
def test_windows_are_cut_to_the_positions_of_the_model(
    study: str, short: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decoder, "_QUICK", ("none-kind", "affine-matrix"))
    monkeypatch.setattr(probe, "run", probe.measure)
    results = run_study(study, short, tmp_path / "out", quick=True).result["results"]
    found = {
        "sensitivity": lambda: results["plain-parts"]["context"],
        "decoder": lambda: results["none-kind"]["before"]["context"],
        "robustness": lambda: results["dense"]["context"],
        "overhead": lambda: 1 + results["cpu-0"]["long"],
    }
    assert found[study]() == 64
    if study == "decoder":
        assert results["none-kind"]["config"]["context"] == 64


def test_the_codebook_study_cuts_its_windows_too(short: str, tmp_path: Path) -> None:
    setup = setup_of(short, tmp_path)
    assert codebook._perplexity(setup, *dense_model(setup), lambda share: None)["context"] == 64


# sensitivity


def test_calibrated_sensitivity_codes_everything_alike(model: str, tmp_path: Path) -> None:
    setup = setup_of(model, tmp_path, quick=False)
    plan = planned(setup.source(), sensitivity.configs(setup)["calibrated"], model).plan
    assert {spec.index_bpw for spec in plan.specs.values()} == {3.0}


def test_the_whole_put_together_is_the_compressed_model(model: str, tmp_path: Path) -> None:
    done = run_study("sensitivity", model, tmp_path / "out", quick=True)
    setup = setup_of(model, tmp_path)
    folder = tmp_path / "again"
    pocketllm.compress(model, sensitivity.configs(setup)["plain"], folder)
    own, tokenizer = pocketllm.load(folder, dtype=dense_model(setup)[0].dtype)
    text = setup.evaluation_texts()[0].text
    seen = text_divergence(own, dense_model(setup)[0], tokenizer, text, 256, 2)
    values = done.result["results"]["plain-parts"]
    groups = values["groups"]
    assert groups[sensitive.ALL]["kl"] == pytest.approx(seen.kl, rel=1e-6)
    assert values["dense"] == pytest.approx(seen.reference_perplexity, rel=1e-6)
    parts = [groups[name] for name in (sensitive.FFN, sensitive.ATTENTION, sensitive.ENDS)]
    assert sum(p["weights"] for p in parts) == groups[sensitive.ALL]["weights"]
    kinds = [groups[name] for name in groups if "_proj" in name]
    ends = groups[sensitive.ENDS]["saved_bytes"]
    report = read_report(folder)
    stored = sum(report["bytes_by_part"][p] for p in ("indices", "row_scales", "codebooks", "decoders"))
    saved = 2 * groups[sensitive.ALL]["weights"] - stored
    assert sum(k["saved_bytes"] for k in kinds) + ends == pytest.approx(saved, rel=1e-4)
    each = done.result["results"]["plain-blocks"]["groups"]
    assert list(each) == [str(n) for n in range(3)]
    assert all(0 < block["kl"] < groups[sensitive.ALL]["kl"] for block in each.values())


def test_matrices_are_put_in_and_taken_out_again(model: str, tmp_path: Path) -> None:
    folder = tmp_path / "c"
    pocketllm.compress(model, tiny.settings(), folder)
    dense, _ = dense_model(setup_of(model, tmp_path))
    before = {name: value.clone() for name, value in dense.named_parameters()}
    matrices, chosen = Matrices.open(folder), "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(KeyError), installed(dense, matrices, [chosen]):
        for name, value in dense.named_parameters():
            assert torch.equal(value, before[name]) is (name != chosen)
        assert torch.equal(dense.get_parameter(chosen), matrices.read(chosen).to(dense.dtype))
        raise KeyError
    assert all(torch.equal(value, before[name]) for name, value in dense.named_parameters())


def test_parts_by_name(tmp_path: Path) -> None:
    for architecture in ("gpt2", "mixtral"):
        pocketllm.compress(
            tiny.save(tmp_path / architecture, architecture),
            tiny.settings(codebook_size=16),
            tmp_path / f"{architecture}-c",
        )
        facts = read_model(tmp_path / f"{architecture}-c").matrices
        found = sensitivity.parts(facts)
        names = {name: {m.kind for m in found[name]} for name in (sensitive.FFN, sensitive.ATTENTION)}
        assert all("attn" in kind for kind in names[sensitive.ATTENTION])
        assert names[sensitive.FFN] and not any("attn" in kind for kind in names[sensitive.FFN])


def sensitive_results(ratio: float, outer: float) -> dict[str, Any]:
    """Attention costs `ratio` times what FFN costs a byte; outer blocks `outer` times the inner ones."""

    def group(weights: float, kl: float) -> dict[str, float]:
        figures = {"weights": weights, "saved_bytes": 1e6 * weights, "bpw": 4.0, "perplexity": 20.0}
        return {**figures, "kl": kl, "kl_stderr": 0.05 * kl}

    groups = {
        "everything": group(5, 0.9),
        "FFN": group(3, 0.3),
        "attention": group(1, 0.1 * ratio),
        "embedding and head": group(1, 0.1),
    }
    blocks = {str(n): group(1, 0.01 * (outer if n < 3 or n > 7 else 1)) for n in range(10)}
    shared = {"dense": 18.0, "text": "words", "context": 8, "windows": 2}
    return {"plain-parts": {"groups": groups, **shared}, "plain-blocks": {"groups": blocks, **shared}}


@pytest.mark.parametrize(
    ("ratio", "outer", "words"),
    [
        (3.0, 2.0, ("spare held on average", "2.0 times as much", "more sensitive than", "3.0 ± 0.21 times")),
        (1.1, 1.01, ("did not hold", "not seen to be more or less sensitive than its size says")),
        (
            0.5,
            0.5,
            ("did not hold", "less sensitive than", "0.50 ± 0.035 times", "they spare 0 and 1 and 2 and 8"),
        ),
    ],
)
def test_sensitivity_says_what_the_figures_say(ratio: float, outer: float, words: tuple[str, ...]) -> None:
    sentences = " ".join(sensitive.findings(sensitive_results(ratio, outer)))
    assert all(word in sentences for word in words), sentences


def test_points_lost_of_the_parts_are_told() -> None:
    dense = {"quiz": {"acc": 0.75, "chance": 0.25, "right": "11111100"}}
    hurt = {"quiz": {"acc": 0.5, "chance": 0.25, "right": "11110000"}}
    groups = {
        "FFN": {"saved_bytes": 5e6, "tasks": dense},
        "attention": {"saved_bytes": 1e6, "tasks": hurt},
    }
    results = {
        **sensitive_results(1.0, 1.0),
        "dense-tasks": {"tasks": dense, "limit": 8},
        "plain-tasks": {"groups": groups, "limit": 8},
    }
    rows = {row[0]: row for table in sensitive.tables(results) for row in table.rows}
    assert rows["attention"][-2:] == ["25 ± 16", "25"]
    (told,) = [text for text in sensitive.findings(results) if text.startswith("Zero-shot")]
    assert (
        "plain FFN 0 ± 0 (0 per MB), attention 25 ± 16" in told
        and "8 documents, 8 of each of 1 tasks" in told
    )
    assert "of 2 losses 0 are more than two standard errors" in told and "in 9 % of such measurements" in told
    assert "more than two standard errors in 0 of 1 comparisons" in told


def test_sensitivity_shows_what_is_lost_for_a_megabyte() -> None:
    from matplotlib.figure import Figure

    results = sensitive_results(1.0, 1.0)
    parts, blocks = sensitive.tables(results)
    for table, row, figures in (
        (
            parts,
            ["FFN", "3.00e-06", "4.00", "3.00"],
            ["20.00", "667", "0.300 ± 0.015", "100 ± 5.0", "0.556x"],
        ),
        (blocks, ["5", "1.00"], ["20.00", "2000", "0.0100 ± 0.00050", "10.0 ± 0.50"]),
    ):
        assert [*row, *figures] in [list(each) for each in table.rows], table.rows
        assert [name for name in table.header if "MB, 10^-3" in name] == [
            "rise per MB, 10^-3",
            "KL per MB, 10^-3",
        ]
    assert sensitive.findings(results)[-1].startswith(
        "Plain: the losses of the parts add up to 0.500 ± 0.017 nats"
    )
    assert "0.40 more, more than two standard errors (0.096)" in sensitive.findings(results)[-1]
    groups = results["plain-parts"]["groups"]
    groups["FFN"] |= {"kl_stderr": None, "perplexity": None}
    row = sensitive.tables(results)[0].rows[1]
    assert row[4:8] == ["not finite", "not finite", "0.300", "100"]
    assert "not seen to be more or less" in sensitive.findings(results)[1]
    results["plain-parts"]["dense"] = None
    assert {row[5] for row in sensitive.tables(results)[0].rows} == {"not finite"}
    sensitive.draw(results, Figure())


# decoder


def test_no_variant_stores_more_than_the_reference(model: str, tmp_path: Path) -> None:
    setup = setup_of(model, tmp_path)
    found = decoder.variants(setup)
    budget = found["none-kind"].side_bytes
    assert {"affine-matrix", "mlp-matrix", "row-kind", "none-model"} <= set(found)
    for key, variant in found.items():
        report = pocketllm.dry_run(model, variant.config)
        parts = report.bytes_by_part
        assert parts["codebooks"] + parts["decoders"] == variant.side_bytes <= budget, key
        if variant.equal:  # less than a codeword, or a column of every decoder, is left over
            assert variant.side_bytes > 0.8 * budget, key


def test_decoder_study(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder, "size_of", lambda setup: decoder.Size(2, 64, 3, 2, 32, 2))
    monkeypatch.setattr(decoder, "_QUICK", ("none-kind", "affine-matrix"))
    done = run_study("decoder", model, tmp_path / "out", quick=True)
    results = done.result["results"]
    assert results["none-kind"]["decoder_bytes"] == 0
    assert results["affine-matrix"]["decoder_bytes"] == 14 * 2 * (16 + 4)
    for values in results.values():
        assert values["after"]["kl"] != values["before"]["kl"]
        assert 0 < values["nmse"] < 0.3
    assert "At equal stored bytes the claim" in done.result["findings"][0]


def decoder_results(kl: float, error: float | None) -> dict[str, Any]:
    """Without a decoder 0.30 ± 0.03 nats, with one `kl` ± `error`; a calibrated pair of unequal bytes."""

    def variant(
        shown: str, kl: float, error: float | None, bytes_: tuple[int, int], equal: bool
    ) -> dict[str, Any]:
        seen = {"kl": kl, "kl_stderr": error, "perplexity": 20.0, "reference_perplexity": 18.0}
        seen |= {"windows": 4, "context": 8}
        figures = {"bpw": 2.5, "nmse": 0.05, "trained_nmse": 0.05, "codewords": 16, "equal": equal}
        stored = dict(zip(("codebook_bytes", "decoder_bytes"), bytes_, strict=True))
        distilled = {"steps": 3}, {"blocks": 2, "batch": 2, "context": 8}
        more = dict(zip(("distilled", "config"), distilled, strict=True))
        return {"shown": shown, "before": seen, "after": seen, **figures, **stored, **more}

    return {
        "none-kind": variant("none", 0.30, 0.03, (1000, 0), True),
        "mlp-matrix": variant("MLP", kl, error, (600, 400), True),
        "none-model": variant("one codebook", 0.5, 0.03, (100, 0), False),
        "calibrated-none": variant("none", 0.1, 0.01, (1000, 0), True),
        "calibrated-mlp": variant("MLP", 0.12, 0.01, (1000, 200), True),
    }


@pytest.mark.parametrize(
    ("kl", "error", "words"),
    [
        (0.29, 0.03, "no difference beyond noise, 0.010 is within two standard errors (0.085)"),
        (0.10, 0.03, "0.20 lower, more than two standard errors (0.085)"),
        (0.50, 0.03, "0.20 higher, more than two standard errors (0.085)"),
        (0.10, None, "no difference beyond noise, 0.20 is of unknown standard error"),
    ],
)
def test_decoders_are_held_against_noise(kl: float, error: float | None, words: str) -> None:
    from matplotlib.figure import Figure

    results = decoder_results(kl, error)
    sentences = decoder.STUDY.findings(results)
    assert all(words in sentence for sentence in sentences[1:3]), sentences
    assert "Calibrated, where decoders come on top of the same codebooks (200 bytes more)" in sentences[-1]
    assert "0.12" in sentences[-1] and "no difference beyond noise, 0.020 is within" in sentences[-1]
    plain, calibrated = decoder.STUDY.tables(results)
    assert [row[0] for row in plain.rows] == ["none", "MLP", "one codebook (90 % fewer bytes)"]
    assert [row[0] for row in calibrated.rows] == ["none", "MLP (20 % more bytes)"]
    assert plain.rows[0][6] == "0.300 ± 0.030"
    decoder.STUDY.draw(results, Figure())


def test_no_decoder_at_equal_bytes() -> None:
    results = {key: v for key, v in decoder_results(0.2, 0.1).items() if key.startswith("none")}
    assert decoder.STUDY.findings(results)[0].startswith("Did not hold here: no decoder fits")


# overhead


def test_operations_are_counted() -> None:
    """By hand: two matrices of 6 x 8 in each form, d = 4, K = 10."""
    crc = "0" * 8
    lookup = CodecConfig(vector_len=4, hidden=8, depth=3)
    forms = (lookup, replace(lookup, decoder="row"), replace(lookup, depth=1, hidden=0))

    def layout(codec: CodecConfig, rotation: tuple[int | None, int | None]) -> Layout:
        entry = MatrixEntry((6, 8), False, 0, 0, 0, 256, rotation, crc)
        return Layout(
            {"a": entry, "b": entry}, (CodebookEntry(10, 4, None, crc),), (DecoderEntry(codec, crc),)
        )

    network = 3 * (4 * 4 * 8 + 8) + 2 * 4
    counts = [overhead.decode_flops(layout(codec, (None, None))) for codec in forms]
    assert counts[0] == {"networks": 10 * network, "scales": 96, "rotation": 0, "one token": 192}
    assert counts[1]["networks"] == 24 * (network + 2 * 5 * 4)
    assert counts[2]["networks"] == 10 * (2 * 16 + 4)
    rotated = overhead.decode_flops(layout(lookup, (0, 1)))
    # columns of length 6 = 2 * 3: one round of Hadamard, 3 products and sums, signs; rows of length 8 = 2^3
    assert rotated["rotation"] == 96 * ((1 + 2 * 3 + 1) + (3 + 0 + 1))


def test_a_process_of_its_own(model: str, tmp_path: Path) -> None:
    asked = probe.Probe(model, probe.DENSE, "cpu", 1, 8, 40, 3, 5.0)
    held = torch.ones(1 << 26)  # 256 MiB, which must not be counted as the other process's
    found = probe.run(asked)
    assert found["tokens"] >= 1
    assert min(found.values()) >= 0
    assert found["peak_bytes"] < held.numel() * 4 / 2
    with pytest.raises(LoadError, match="cannot be measured in mode 'packed'"):
        probe.run(replace(asked, folder=str(tmp_path / "nowhere"), mode="packed"))


def test_overhead_study(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "run", probe.measure)
    done = run_study("overhead", model, tmp_path / "out", quick=True)
    results = done.result["results"]
    assert set(results["cpu-0"]["runs"]) == {
        *(probe.DENSE, "lookup, decoded at load", "lookup, packed"),
        *("row, decoded at load", "row, packed"),
    }
    for run in results["cpu-0"]["runs"].values():
        assert run["load_seconds"] > 0 and run["token_cpu_seconds"] > 0
    assert results["form-row"]["decode_flops"] > results["form-lookup"]["decode_flops"]


def test_ratios_are_those_within_a_round() -> None:
    """A machine that is half as fast in one round does not change what is compared."""
    jobs = {probe.DENSE: 1.0, "lookup, decoded at load": 2.0, "lookup, packed": 4.0}
    names = ("load", "first", "long", "token")
    keys = (*(f"{n}_seconds" for n in names), *(f"{n}_cpu_seconds" for n in names), "peak_bytes")
    results: dict[str, Any] = {
        "form-lookup": {"flops": {"one token": 2.0}, "decode_flops": 6.0},
    }
    for number, slow in enumerate((1.0, 3.0, 2.0)):
        runs = {job: {"loaded_bytes": cost, **dict.fromkeys(keys, cost * slow)} for job, cost in jobs.items()}
        results[f"cpu-{number}"] = {"runs": runs, "short": 8, "long": 64, "gpu": None}
    sentences = overhead_page.findings(results)
    assert "decoding once at load costs 2.0 times the load" in sentences[0]
    assert "4.0 times the work for a token; for a prompt of 64 tokens 4.0 times" in sentences[0]
    assert "loading and decoding takes 4.00 s (dense weights 2.00 s)" in sentences[1]
    assert "lookup 3.00" in sentences[2]


# robustness


def test_robustness_on_several_texts(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "wikitext2/wiki.test.raw": "plain words in a row. " * 60,
        "c4/c4_prefix_completion.jsonl": '{"prefix": "some te", "gold_completion": "xt of the web"}\n' * 60,
        "tinystories/exllamav3_cal_tiny.txt": "once upon a time there was a cat. " * 40,
    }
    for name, text in files.items():
        (tmp_path / "data" / name).parent.mkdir(parents=True)
        (tmp_path / "data" / name).write_text(text)
    monkeypatch.setenv("POCKETLLM_DATA", str(tmp_path / "data"))
    done = run_study("robustness", model, tmp_path / "out", quick=True)
    names = ["WikiText-2 raw test", "C4 (part)", "TinyStories (sample)"]
    assert list(done.result["config"]["texts"]) == names
    results = done.result["results"]
    assert list(results["dense"]["perplexity"]) == names
    assert len(set(results["dense"]["perplexity"].values())) == 3
    assert results["plain-16x"]["nmse"] > results["plain-8x"]["nmse"]
    assert not (tmp_path / "out.partial").exists()


def robust_results(plain: float | None) -> dict[str, Any]:
    """Dense 10, calibrated 11 and 15; the published method at 8x as given."""

    def entry(perplexity: float | None, right: str, bpw: float) -> dict[str, Any]:
        sizes = {"ratio_matrices_fp32": 32 / bpw, "ratio_files_bf16": 16 / bpw, "bytes_on_disk": 1e6}
        acc = right.count("1") / len(right)
        tasks = {"quiz": {"acc": acc, "chance": 0.25, "right": right}}
        texts = {"one": perplexity, "two": None if perplexity is None else 2 * perplexity}
        shared = {"context": 8, "windows": 2, "limit": 8, "nmse": 0.1, "bpw_matrices": bpw}
        return {"perplexity": texts, "tasks": tasks, **sizes, **shared}

    return {
        "dense": entry(10.0, "11111100", 16.0),
        "plain-8x": entry(plain, "11000000", 4.0),
        "calibrated-8x": entry(11.0, "11111010", 4.0),
        "calibrated-16x": entry(15.0, "11110000", 2.0),
    }


def drawn(results: dict[str, Any]) -> Any:
    """The picture of the study `robustness`."""
    from matplotlib.figure import Figure

    figure = Figure()
    robust.draw(results, figure)
    return figure


@pytest.mark.parametrize("lost", [("one",), ("one", "two")])
def test_robustness_where_the_dense_model_is_not_finite(lost: tuple[str, ...]) -> None:
    results = robust_results(11.0)
    for text in lost:
        results["dense"]["perplexity"][text] = None
    sentences, rows = robust.findings(results), robust.tables(results)[0].rows
    assert rows[0][5:7] == ["not finite", "20.00" if len(lost) == 1 else "not finite"]
    assert rows[1][-1] == ("1.10" if len(lost) == 1 else "not finite")
    assert any("nothing can be compared" in s for s in sentences) is (len(lost) == 2)
    assert not any("None" in s or "nan" in s for s in sentences), sentences
    drawn(results)


def test_robustness_where_the_dense_model_only_guesses() -> None:
    results = robust_results(11.0)
    results["dense"]["tasks"] = {"quiz": {"acc": 0.25, "chance": 0.25, "right": "11000000"}}
    assert {row[-1] for row in robust.tables(results)[1].rows[1:]} == {"none to keep"}


def test_robustness_without_tasks_says_that_the_claim_is_not_tested() -> None:
    results = {key: {**values, "tasks": {}} for key, values in robust_results(11.0).items()}
    first = robust.findings(results)[0]
    assert first.startswith("Not tested: the claim is about zero-shot tasks")
    assert "at best to 1.10 times the dense model's perplexity (plain-8x)" in first


def test_robustness_draws_what_there_is() -> None:
    from matplotlib.colors import to_rgb

    results = {k: {**v, "tasks": {}} for k, v in robust_results(11.0).items() if "calibrated" not in k}
    axes = drawn(results).axes[0]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["plain: one", "plain: two"]
    assert "2 times" in axes.texts[0].get_text()
    lines = drawn(robust_results(11.0)).axes[0].get_legend().get_lines()
    hollow = [to_rgb(line.get_markerfacecolor()) == (1.0, 1.0, 1.0) for line in lines]
    assert hollow == [True, True, False, False]


def test_losses_are_paired_by_document() -> None:
    results = robust_results(11.0)
    lost = points_lost(results["dense"]["tasks"], results["calibrated-8x"]["tasks"])
    assert lost[0] == pytest.approx(0.0)
    differences = [0, 0, 0, 0, 0, 1, -1, 0]
    assert lost[1] == pytest.approx(100 * math.sqrt(sum(d * d for d in differences) / 7 / 8))


@pytest.mark.parametrize(
    ("plain", "words"),
    [
        (11.0, "Plain: perplexity over the dense model's is plain-8x 1.10; none of the settings"),
        (30.0, "plain-8x 3.00; it more than doubles from 4.00 bits per weight (plain-8x) on"),
        (None, "plain-8x not finite; it more than doubles from 4.00 bits"),
    ],
)
def test_robustness_says_where_it_breaks(plain: float | None, words: str) -> None:
    from matplotlib.figure import Figure

    results = robust_results(plain)
    sentences = robust.findings(results)
    assert any(words in sentence for sentence in sentences), sentences
    assert "does not hold at any ratio" in sentences[0]
    assert "calibrated-16x 25" in sentences[0]
    rows = {row[0]: row for row in robust.tables(results)[1].rows}
    assert rows["plain-8x"][-1] == "0 %"
    robust.draw(results, Figure())
