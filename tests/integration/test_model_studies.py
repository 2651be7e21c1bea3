"""The studies of whole models, on tiny ones: what is compared is what it is said to be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import pocketllm
from pocketllm.evaluate.kl import text_divergence
from pocketllm.format.checkpoint import read_report
from pocketllm.plan.target import planned
from pocketllm.report.model_facts import read_model
from pocketllm.runtime.decode import Matrices
from pocketllm.studies import load, run_study
from pocketllm.studies.measure import codebook_steps, decoder_steps, probe, sensitivity_steps as sensitive
from pocketllm.studies.measure.compressed_models import dense_model, installed
from tests import tiny
from tests.studies import setup_of, small_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return small_model(tmp_path_factory)


@pytest.fixture(autouse=True)
def _no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("POCKETLLM_DATA", raising=False)


@pytest.mark.parametrize("study", ["sensitivity", "decoder", "overhead", "robustness"])
def test_steps_of_both_sizes_have_keys_of_their_own(study: str, model: str, tmp_path: Path) -> None:
    for quick in (True, False):
        keys = [step.key for step in load(study).measurement.steps(setup_of(model, tmp_path, quick))]
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
    monkeypatch.setattr(decoder_steps, "_QUICK", ("none-kind", "affine-matrix"))
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
    assert codebook_steps._perplexity(setup, *dense_model(setup), lambda share: None)["context"] == 64


# sensitivity


def test_calibrated_sensitivity_codes_everything_alike(model: str, tmp_path: Path) -> None:
    setup = setup_of(model, tmp_path, quick=False)
    plan = planned(setup.source(), sensitive.configs(setup)["calibrated"], model).plan
    assert {spec.index_bpw for spec in plan.specs.values()} == {3.0}


def test_the_whole_put_together_is_the_compressed_model(model: str, tmp_path: Path) -> None:
    done = run_study("sensitivity", model, tmp_path / "out", quick=True)
    setup = setup_of(model, tmp_path)
    folder = tmp_path / "again"
    pocketllm.compress(model, sensitive.configs(setup)["plain"], folder)
    own, tokenizer = pocketllm.load(folder, mode="dense", dtype=dense_model(setup)[0].dtype)
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
        found = sensitive.parts(facts)
        names = {name: {m.kind for m in found[name]} for name in (sensitive.FFN, sensitive.ATTENTION)}
        assert all("attn" in kind for kind in names[sensitive.ATTENTION])
        assert names[sensitive.FFN] and not any("attn" in kind for kind in names[sensitive.FFN])


def sensitive_results(ratio: float, outer: float) -> dict[str, Any]:
    """Attention costs `ratio` times what FFN costs a byte; outer blocks `outer` times the inner ones.

    In four windows every KL is a tenth more or less: of attention and inner blocks in two of them out of step.
    """
    step, out = (1, -1, 1, -1), (1, 1, -1, -1)

    def group(weights: float, kl: float, signs: tuple[int, ...] = step) -> dict[str, Any]:
        figures = {"weights": weights, "saved_bytes": 1e6 * weights, "bpw": 4.0, "perplexity": 20.0}
        windows = [kl * (1 + 0.1 * sign) for sign in signs]
        return {**figures, "kl": kl, "kl_stderr": 0.05 * kl, "window_kl": windows}

    groups = {
        "everything": group(5, 0.9),
        "FFN": group(3, 0.3),
        "attention": group(1, 0.1 * ratio, out),
        "embedding and head": group(1, 0.1),
    }
    outside = {n: n < 3 or n > 7 for n in range(10)}
    blocks = {str(n): group(1, 0.01 * (outer if o else 1), step if o else out) for n, o in outside.items()}
    shared = {"dense": 18.0, "text": "words", "context": 8, "windows": 4}
    return {"plain-parts": {"groups": groups, **shared}, "plain-blocks": {"groups": blocks, **shared}}


@pytest.mark.parametrize(
    ("ratio", "outer", "words"),
    [
        (3.0, 2.0, ("spare held on average", "2.0 times as much", "more sensitive than", "3.0 ± 0.24 times")),
        (1.1, 1.01, ("spare is not seen", "not seen to be more or less sensitive than its size says")),
        (
            0.5,
            0.5,
            ("did not hold", "less sensitive than", "0.50 ± 0.041 times", "they spare 0 and 1 and 2 and 8"),
        ),
    ],
)
def test_sensitivity_says_what_the_figures_say(ratio: float, outer: float, words: tuple[str, ...]) -> None:
    sentences = " ".join(load("sensitivity").findings(sensitive_results(ratio, outer)))
    assert all(word in sentences for word in words), sentences


def task_results() -> dict[str, Any]:
    """A quiz of eight questions: the attention loses 0.2 of probability, the FFN nothing, one block of two 0.1."""

    def quiz(right: str, lost: float) -> dict[str, Any]:
        likely = " ".join(f"{0.9 - lost - 0.01 * (n % 2) * (lost > 0):.4f}" for n in range(8))
        return {"quiz": {"acc": right.count("1") / 8, "chance": 0.25, "right": right, "probability": likely}}

    dense, hurt = quiz("11111110", 0.0), quiz("11110000", 0.2)
    groups = {
        name: {"saved_bytes": saved, "tasks": scored}
        for name, saved, scored in (
            ("FFN", 5e6, dense),
            ("attention", 1e6, hurt),
            ("self_attn.v_proj", 1e6, hurt),
        )
    }
    alone = {str(n): {"saved_bytes": 1e6, "tasks": quiz("11111110", 0.1 * n)} for n in range(2)}
    return {
        "dense-tasks": {"tasks": dense, "limit": 8},
        "plain-tasks": {"groups": groups, "limit": 8},
        "plain-block-tasks": {"groups": alone, "limit": 8},
    }


def test_zero_shot_losses_are_told_by_part_kind_and_block() -> None:
    results = {**sensitive_results(1.0, 1.0), **task_results()}
    tables = {table.title: table for table in load("sensitivity").tables(results)}
    rows = {row[0]: row for row in tables["Zero-shot tasks (plain)"].rows}
    assert rows["attention"][1:] == ["1.00", "50.0", "38 ± 18", "21 ± 0.19", "20500 ± 189"]
    assert rows["FFN"][3:] == ["0 ± 0", "0 ± 0", "0 ± 0"]
    assert [row[0] for row in tables["Zero-shot tasks by block (plain)"].rows[1:]] == ["0", "1"]
    parts, block = [text for text in load("sensitivity").findings(results) if text.startswith("Zero-shot")]
    assert "(8 documents of quiz): plain FFN 0 ± 0 (0 ± 0 thousandths per MB), attention 21 ± 0.19" in parts
    assert "attention loses 20500 thousandths more than the FFN, beyond noise" in parts, parts
    assert (
        "of 1 kinds alone 1 differ from the dense model beyond noise, where chance would give 0.050" in parts
        and "self_attn.v_proj" in parts
    )
    assert "1 of 2 single blocks" in block and ": 1 (10 ± 0.19) (points lost)" in block


def test_tasks_that_the_dense_model_cannot_do_say_nothing() -> None:
    results = {**sensitive_results(1.0, 1.0), **task_results()}
    results["dense-tasks"]["tasks"]["quiz"] |= {"right": "11000000", "acc": 0.25}
    assert any(
        text.startswith("Zero-shot tasks say nothing here") for text in load("sensitivity").findings(results)
    )
    assert load("sensitivity").tables(results)[1].rows[2][-2:] == ["", ""]


def test_sensitivity_shows_what_is_lost_for_a_megabyte() -> None:
    from matplotlib.figure import Figure

    results = sensitive_results(1.0, 1.0)
    parts, blocks = load("sensitivity").tables(results)
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
    assert (
        load("sensitivity")
        .findings(results)[-1]
        .startswith("Plain: the losses of the parts add up to 0.500 nats")
    )
    assert "0.40 more, beyond noise (± 0.094 at 95 %)" in load("sensitivity").findings(results)[-1]
    groups = results["plain-parts"]["groups"]
    for group in groups.values():  # of one window
        group |= {"window_kl": group["window_kl"][:1]}
    results["plain-parts"]["windows"] = 1
    groups["FFN"] |= {"kl_stderr": None, "perplexity": None}
    row = load("sensitivity").tables(results)[0].rows[1]
    assert row[4:8] == ["not finite", "not finite", "0.300", "100"]
    assert "not seen to be more or less" in load("sensitivity").findings(results)[1]
    results["plain-parts"]["dense"] = None
    assert {row[5] for row in load("sensitivity").tables(results)[0].rows} == {"not finite"}
    load("sensitivity").draw(results, Figure())


# decoder


def test_no_variant_stores_more_than_the_reference(model: str, tmp_path: Path) -> None:
    setup = setup_of(model, tmp_path)
    found = decoder_steps.variants(setup)
    assert {"affine-matrix", "mlp-matrix", "row-kind", "none-model"} <= set(found)
    stored = {}
    for key, variant in found.items():
        parts = pocketllm.dry_run(model, variant.config).bytes_by_part
        stored[key] = parts["codebooks"] + parts["decoders"]
    budget = stored["none-kind"]
    assert all(nbytes <= budget for nbytes in stored.values())
    for key, variant in found.items():
        if variant.equal:  # less than a codeword, or a column of every decoder, is left over
            assert stored[key] > 0.8 * budget, key


def test_decoder_study(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_steps, "size_of", lambda setup: decoder_steps.Size(2, 64, 3, 2, 32, 2))
    monkeypatch.setattr(decoder_steps, "_QUICK", ("none-kind", "affine-matrix"))
    done = run_study("decoder", model, tmp_path / "out", quick=True)
    results = done.result["results"]
    assert results["none-kind"]["decoder_bytes"] == 0
    assert results["affine-matrix"]["decoder_bytes"] == 14 * 2 * (16 + 4)
    for values in results.values():
        assert values["after"]["kl"] != values["before"]["kl"]
        assert 0 < values["nmse"] < 0.3
    assert "At equal stored bytes the claim" in done.result["findings"][0]


def decoder_results(kl: float, error: float | None) -> dict[str, Any]:
    """Without a decoder 0.30 nats, with one `kl`; window by window the difference has that standard error.

    None: a single window. The calibrated pair has bytes of its own beside the indices, and a little more in all.
    """
    signs = (0,) if error is None else (1, -1, 1, -1)

    def variant(
        shown: str, kl: float, error: float, bytes_: tuple[int, int], equal: bool = True
    ) -> dict[str, Any]:
        by_window = [kl + error * sign * 3**0.5 for sign in signs]
        seen = {"kl": kl, "kl_stderr": 0.03 if len(signs) > 1 else None, "window_kl": by_window}
        seen |= {"perplexity": 20.0, "reference_perplexity": 18.0, "windows": len(signs), "context": 8}
        figures = {"bpw": 2.5 + bytes_[1] / 1e5, "nmse": 0.05, "start_nmse": 0.1, "trained_nmse": 0.05}
        figures["codewords"] = 16
        stored = dict(zip(("codebook_bytes", "decoder_bytes"), bytes_, strict=True))
        distilled = {"steps": 3}, {"blocks": 2, "batch": 2, "context": 8}
        more = dict(zip(("distilled", "config"), distilled, strict=True))
        return {"shown": shown, "equal": equal, "before": seen, "after": seen, **figures, **stored, **more}

    return {
        "none-kind": variant("none", 0.30, 0.0, (1000, 0)),
        "mlp-matrix": variant("MLP", kl, error or 0.0, (600, 400)),
        "none-model": variant("one codebook", 0.5, 0.0, (100, 0), False),
        "calibrated-none": variant("none", 0.1, 0.0, (1000, 0)),
        "calibrated-mlp": variant("MLP", 0.12, 0.02, (1000, 200)),
    }


@pytest.mark.parametrize(
    ("kl", "error", "words"),
    [
        (0.29, 0.03, "0.010 lower, within noise (± 0.095 at 95 %)"),
        (0.10, 0.03, "0.20 lower, beyond noise (± 0.095 at 95 %)"),
        (0.50, 0.03, "0.20 higher, beyond noise (± 0.095 at 95 %)"),
        (0.10, None, "0.20 lower, of one measurement each"),
    ],
)
def test_decoders_are_held_against_noise(kl: float, error: float | None, words: str) -> None:
    from matplotlib.figure import Figure

    results = decoder_results(kl, error)
    sentences = load("decoder").findings(results)
    assert all(words in sentence for sentence in sentences[1:3]), sentences
    assert "to pay for the decoders' 200 bytes (0.080 % more bytes in all with them)" in sentences[-1]
    noise = "of one measurement each" if error is None else "within noise (± 0.064 at 95 %)"
    assert "0.12" in sentences[-1] and f"0.020 higher, {noise}" in sentences[-1]
    plain, calibrated = load("decoder").tables(results)
    assert [row[0] for row in plain.rows] == ["none", "MLP", "one codebook (90 % fewer bytes)"]
    assert [row[0] for row in calibrated.rows] == ["none", "MLP (0.080 % more bytes in all)"]
    assert plain.rows[0][6] == ("0.300" if error is None else "0.300 ± 0.030")
    load("decoder").draw(results, Figure())


def test_no_decoder_at_equal_bytes() -> None:
    results = {key: v for key, v in decoder_results(0.2, 0.1).items() if key.startswith("none")}
    assert load("decoder").findings(results)[0].startswith("Did not hold here: no decoder fits")


# overhead
