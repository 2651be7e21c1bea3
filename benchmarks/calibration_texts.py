"""What the calibration text changes: SmolLM2-135M at 2.05 bits per weight, judged on six kinds of text and two tasks.

    POCKETLLM_DATA=... python benchmarks/calibration_texts.py [NAME ...]

NAME is a row, by default every row that has no result. Files are cut into a part to calibrate on and a part to judge
on. None of it is test text, so that the default may be chosen by the mean. The embedding stays dense; every model is
compressed and evaluated in a process of its own, in bfloat16. `own samples` is text that the dense model has written.
Writes results/calibration_texts.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import CONTEXT, SMOLLM2, data_file, quiet, rows_to_measure, save

BPW = 2.05
WINDOWS = 4  # of CONTEXT tokens, of each text that is judged on
TASKS = ("piqa", "arc_easy")
QUESTIONS = 400  # of each task
SAMPLES, SAMPLED_TOKENS = 72, 512
CODE = ("argparse", "ast", "decimal", "inspect", "tarfile", "typing"), ("bisect", "shutil", "zipfile")


@dataclass(frozen=True)
class Row:
    """texts: names of `calibration_parts`; none: the default text of the package. options: of `compress`."""

    texts: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


MIX = ("WikiText", "C4", "Wikipedia", "instructions")
ROWS = {
    "Python's documentation (the default)": Row(),
    "own samples": Row(("own samples",)),
    "WikiText": Row(("WikiText",)),
    "C4": Row(("C4",)),
    "mix": Row(MIX),
    "mix and code": Row((*MIX, "code")),
    "mix, 131,072 tokens": Row(MIX, ("--set", "calibration.tokens=131072")),
    "mix, instructions without template": Row((*MIX[:3], "instructions without template")),
    "mix and own samples": Row((*MIX, "own samples")),
}


def main() -> None:
    """Measure the rows named on the command line; the others keep their figures."""
    names, rows = rows_to_measure(__doc__ or "", "calibration_texts", "rows", ROWS)
    with tempfile.TemporaryDirectory() as scratch:
        parts, judged = cut_texts(Path(scratch))
        for name in names:
            row, folder = ROWS[name], Path(scratch, "model")
            texts = [part for text in row.texts for part in ("--calibration", str(parts[text]()))]
            target = ("--bpw", str(BPW), "--keep-embeddings", "--overwrite")
            report = command("compress", SMOLLM2.source, "-o", str(folder), *target, *texts, *row.options)
            rows[name] = {
                "seconds": report["seconds"],
                "bpw_blocks": report["bpw_blocks"],
                **judge(folder, judged),
            }
            print(name, rows[name], flush=True)
            values = {
                "model": SMOLLM2.source,
                "bpw": BPW,
                "context": CONTEXT,
                "windows": WINDOWS,
                "questions": QUESTIONS,
                "rows": {known: rows[known] for known in ROWS if known in rows},
            }
            save("calibration_texts", "python benchmarks/calibration_texts.py", values)


def judge(folder: Path, judged: dict[str, Path]) -> dict[str, Any]:
    """Perplexity over the dense one and divergence on every text, and the accuracy of the tasks."""
    texts = [part for path in judged.values() for part in ("--ppl", str(path))]
    how = ("--context", str(CONTEXT), "--windows", str(WINDOWS), "--dtype", "bfloat16")
    tasks = ("--tasks", ",".join(TASKS), "--limit", str(QUESTIONS))
    found = command("eval", str(folder), *texts, *how, "--against", SMOLLM2.source, *tasks)
    kept = ("perplexity", "kl", "kl_stderr", "top1_agreement")
    each = {
        name: {key: values[key] for key in kept} | {"dense_perplexity": values["reference_perplexity"]}
        for name, values in zip(judged, found["texts"], strict=True)
    }
    return {"texts": each, "accuracy": found["average"], "dense_accuracy": found["against"]["average"]}


def command(*arguments: str) -> dict[str, Any]:
    """`pocketllm` in a process of its own; its JSON."""
    line = [sys.executable, "-m", "pocketllm", *arguments, "--json", "--quiet"]
    done = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def cut_texts(scratch: Path) -> tuple[dict[str, Callable[[], Path]], dict[str, Path]]:
    """Texts to calibrate on, each made when it is asked for, and those to judge on."""

    def written(name: str, lines: Iterable[str]) -> Path:
        path = scratch / name
        path.write_text("".join(lines), encoding="utf-8")
        return path

    def lines(*file: str) -> list[str]:
        return data_file(*file).read_text(encoding="utf-8").splitlines(keepends=True)

    c4, wiki = lines("c4", "c4_prefix_completion.jsonl"), lines("wikipedia_cal", "exllamav3_cal_wiki.txt")
    chats = lines("instruct", "dolly_hhrlhf_train_small.jsonl")
    plain = (f"{row['prompt']}\n{row['response']}\n\n" for row in map(json.loads, chats[:800]))
    code, other_code = (
        "\n\n".join(
            Path(sysconfig.get_path("stdlib"), f"{module}.py").read_text(encoding="utf-8")
            for module in modules
        )
        for modules in CODE
    )
    parts = {
        "WikiText": data_file("wikitext2", "wiki.train.first_part.txt"),
        "C4": written("c4.jsonl", c4[:1000]),
        "Wikipedia": written("wikipedia.txt", wiki[:15000]),
        "instructions": written("instructions.jsonl", chats[:800]),
        "instructions without template": written("instructions.txt", plain),
        "code": written("code.txt", code),
    }
    judged = {
        "WikiText": data_file("wikitext2", "wiki.valid.near_raw.txt"),
        "C4": written("c4_judged.jsonl", c4[1000:]),
        "Wikipedia": written("wikipedia_judged.txt", wiki[15000:]),
        "chat": written("chat_judged.jsonl", chats[800:]),
        "code": written("code_judged.txt", other_code),
        "stories": data_file("tinystories", "exllamav3_cal_tiny.txt"),
    }
    given = {name: (lambda path=path: path) for name, path in parts.items()}
    return {**given, "own samples": lambda: sampled(scratch / "samples.txt")}, judged


def sampled(path: Path) -> Path:
    """Text of the dense model at temperature 1, from the token that separates the documents of its training."""
    if path.is_file():
        return path
    import torch
    from transformers import AutoTokenizer

    from pocketllm.source.builtin import fetch
    from pocketllm.source.folder import load_dense

    quiet()
    folder = fetch(SMOLLM2.source)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), load_dense(folder, torch.bfloat16)
    torch.manual_seed(0)
    start = torch.full((SAMPLES, 1), tokenizer.convert_tokens_to_ids("<|endoftext|>"))
    length = {"min_new_tokens": SAMPLED_TOKENS, "max_new_tokens": SAMPLED_TOKENS}
    ids = model.generate(start, do_sample=True, temperature=1.0, top_k=0, **length)
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    path.write_text("\n\n".join(texts), encoding="utf-8")
    return path


if __name__ == "__main__":
    main()
