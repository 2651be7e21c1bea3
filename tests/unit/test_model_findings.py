"""What the studies of whole models say of given figures."""

from __future__ import annotations

from typing import Any

import pytest

from pocketllm.studies import load


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
