"""The table of learning indices."""

from __future__ import annotations

from typing import Any

from pages import load_results, markdown_table

HEAD = ["model", "round", "chosen by", "segments", "predicted", "gradient's text", "held text"]


def index_learning() -> str:
    """Predicted and found changes of the KL, and where accepted rounds end."""
    found = load_results("index_learning")
    rows, ends = list[list[str]](), list[str]()
    for name, model in found["models"].items():
        held = list(model["kl_after"])
        for number, one in enumerate(model["rounds"], 1):
            rows += [_row(name, number, tried, held) for tried in one["tried"]]
        if len(model["rounds"]) > 1:
            ends.append(f"{name}: {_ends(model, held)}")
    notes = []
    for name, model in found["models"].items():
        projected = f"{model['projected']} windows of {model['context']}"
        notes.append(f"{name}: gradients of {model['tokens']:,} tokens, curvature of {projected}")
    texts = [markdown_table(HEAD, rows)]
    if ends:
        texts.append(f"With the best number accepted in every round: {'; '.join(ends)}.")
    texts.append(
        f"Changes of KL(dense || compressed) in nats per token, ± standard error. {'; '.join(notes)}."
    )
    commands = dict.fromkeys(model.get("command", found["command"]) for model in found["models"].values())
    return "\n\n".join([*texts, ", ".join(f"`{command}`" for command in commands)])


def _row(name: str, number: int, tried: dict[str, Any], held: list[str]) -> list[str]:
    by = {"joint": "curvature between them", "kronecker": "Kronecker curvature"}[tried["by"]]
    first = next(value for text, value in tried["found"].items() if text not in held)
    others = ", ".join(_change(tried["found"][text]) for text in held)
    return [
        name,
        str(number),
        by,
        str(tried["segments"]),
        f"{tried['predicted']:+.4f}",
        _change(first),
        others,
    ]


def _change(value: list[float]) -> str:
    return f"{value[0]:+.4f} ± {value[1]:.4f}"


def _ends(model: dict[str, Any], held: list[str]) -> str:
    """KL before and after, segments, time."""
    before, after = model["rounds"][0]["kl_before"], model["kl_after"]
    kl = ", ".join(f"{before[text]:.4f} to {after[text]:.4f}" for text in held)
    count = sum(one["accepted"] for one in model["rounds"])
    seconds = sum(one["seconds"] for one in model["rounds"])
    return f"{kl} with {count} segments in {len(model['rounds'])} rounds, {seconds:.0f} s"
