"""Can the indices of a compressed model learn? Predicted and found change of its KL divergence if short segments of the
trellis paths are replaced by the alternatives that a gradient promises most of. Writes results/index_learning.json.

    POCKETLLM_DATA=... python benchmarks/index_learning.py                    # stories260K, see index_stories.py
    POCKETLLM_DATA=... python benchmarks/index_learning.py NAME=FOLDER ...    # other models

In each round:

1. Gradients of the KL on training text in four groups of micro-batches; loud tokens are cut. Kronecker factors of the
   curvature (G and H, only their diagonals are used) from gradients of tokens drawn from the teacher.
2. The best alternatives of segments of each matrix by these (index_segments.py); used if the groups agree: mean over
   standard error of the slope above `AGREEMENT`.
3. The curvature of the kept ones, and between them across all matrices, from gradients of drawn tokens, window by
   window: s_wc = (gradient of window w) . (move of c), so moves C cost sum_w (sum_C s_wc)^2 / 2 per token.
4. Segments are chosen one after another by slope - curvature, given those chosen before ("joint"), or by slope and
   Kronecker curvature of each alone ("kronecker"). The change is measured on the text of the gradients and on held
   text. With `--rounds` above 1, the joint number that is best on the first held text is accepted.

The folder is not changed. What was measured before under another NAME is kept.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, data_file, quiet, save
from index_stories import rows
from index_trial import Candidates, Trial
from torch import Tensor

from pocketllm.config import DistillConfig
from pocketllm.recover.base_model import open_base
from pocketllm.text.windows import read_windows
from recovery import TEXTS, VALIDATION

AGREEMENT = 3.0
TOPS = (10, 100, 1000)
C4_HELD = 48  # last windows of the C4 text, which are not trained on


class Choice:
    """Which of the candidates of all matrices to take, in order; numbers count through all of them."""

    def __init__(self, candidates: list[Candidates]) -> None:
        self.sizes = [len(one.alone) for one in candidates]
        slopes = torch.cat([one.slopes for one in candidates])
        self.slope = slopes.mean(dim=1)
        error = slopes.std(dim=1) / slopes.shape[1] ** 0.5
        self.agreed = self.slope > AGREEMENT * error
        self.alone = torch.cat([one.alone for one in candidates])
        self.along = torch.cat([one.along for one in candidates], dim=1)

    def kronecker(self, most: int) -> tuple[Tensor, Tensor]:
        """(numbers, predicted gains) by slope and Kronecker curvature of each alone."""
        gain = torch.where(self.agreed, self.slope - self.alone, 0)
        gains, order = gain.sort(descending=True, stable=True)
        count = min(most, int((gains > 0).sum()))
        return order[:count], gains[:count]

    def joint(self, most: int) -> tuple[Tensor, Tensor]:
        """(numbers, predicted gains) one after another, each with the curvature between it and those before."""
        own = torch.maximum(self.along.square().sum(dim=0) / 2, self.alone)
        free, moved = self.agreed.clone(), torch.zeros(len(self.along))
        numbers, gains = list[int](), list[float]()
        while len(numbers) < most:
            gain = torch.where(free, self.slope - own - moved @ self.along, -1)
            number = int(gain.argmax())
            if gain[number] <= 0:
                break
            numbers.append(number)
            gains.append(float(gain[number]))
            free[number] = False
            moved += self.along[:, number]
        return torch.tensor(numbers, dtype=torch.int64), torch.tensor(gains)

    def by_matrix(self, numbers: Tensor) -> list[Tensor]:
        """Numbers within the candidates of each matrix."""
        marks = torch.zeros(sum(self.sizes), dtype=torch.bool)
        marks[numbers] = True
        return [part.nonzero()[:, 0] for part in marks.split(self.sizes)]


def change(trial: Trial, texts: dict[str, Tensor], before: dict[str, Tensor]) -> dict[str, list[float]]:
    """Change of the KL by text, with its standard error over windows."""
    found = {}
    for name, windows in texts.items():
        difference = trial.kl(windows) - before[name]
        found[name] = [float(difference.mean()), float(difference.std() / len(difference) ** 0.5)]
    return found


def one_round(
    trial: Trial, windows: Tensor, held: dict[str, Tensor], chosen: argparse.Namespace, accept: bool
) -> dict[str, Any]:
    """Steps 1 to 4; windows [N, context] are divided among them."""
    started, size = time.monotonic(), windows.shape[1]
    counts = [chosen.tokens // size, chosen.curvature_tokens // size, chosen.projected]
    first, second, third = windows[: sum(counts)].split(counts)
    candidates = trial.candidates(trial.gradients(first), trial.curvature(second))
    trial.project(candidates, third)
    texts = {"text of the gradients": first[: chosen.windows], **held}
    before = {name: trial.kl(part) for name, part in texts.items()}
    choice, tried = Choice(candidates), list[dict[str, Any]]()
    best = (0.0, torch.empty(0, dtype=torch.int64))
    for kind, (numbers, gains) in {
        "joint": choice.joint(max(TOPS)),
        "kronecker": choice.kronecker(max(TOPS)),
    }.items():
        if accept and kind == "kronecker":
            continue
        for top in dict.fromkeys(min(top, len(numbers)) for top in TOPS):
            undo = trial.replace(candidates, choice.by_matrix(numbers[:top]))
            found = change(trial, texts, before)
            trial.put_back(undo)
            tried.append(
                {"by": kind, "segments": top, "predicted": -float(gains[:top].sum()), "found": found}
            )
            print(tried[-1], flush=True)
            judged = found[next(iter(held))][0]
            if kind == "joint" and judged < best[0]:
                best = judged, numbers[:top]
    if accept:
        trial.replace(candidates, choice.by_matrix(best[1]))
    own = choice.along.square().sum(dim=0) / 2
    order = (choice.slope - choice.alone).argsort(descending=True)[: max(TOPS)]
    return {
        "kl_before": {name: float(value.mean()) for name, value in before.items()},
        "candidates": len(choice.slope),
        "agreed": int(choice.agreed.sum()),
        "curvature_over_kronecker": float((own[order] / choice.alone[order]).median()),
        "tried": tried,
        "accepted": len(best[1]) if accept else 0,
        "seconds": round(time.monotonic() - started, 1),
    }


def measured(folder: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """All rounds on one model."""
    tokenizer = open_base(folder, None).tokenizer

    def read(path: Path) -> Tensor:
        return read_windows(tokenizer, (str(path),), chosen.context)

    if chosen.text:
        train = torch.cat([read(path) for path in chosen.text])
        held = {path.stem: read(path)[: chosen.windows] for path in chosen.held}
    else:
        wikitext, c4, *others = (read(data_file(*text)) for text in TEXTS)
        train = torch.cat([wikitext, c4[:-C4_HELD], *others])
        held = {"WikiText-2 validation": read(data_file(*VALIDATION))[: chosen.windows]}
        held["C4"] = c4[-C4_HELD:][: chosen.windows]
    train = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))]
    config = DistillConfig(context=chosen.context)
    trial = Trial(folder, chosen.teacher, train, config, chosen.dtype)
    used = (chosen.tokens + chosen.curvature_tokens) // chosen.context + chosen.projected
    rounds = [
        one_round(trial, train.roll(-used * number, dims=0), held, chosen, accept=chosen.rounds > 1)
        for number in range(chosen.rounds)
    ]
    after = {name: float(trial.kl(part).mean()) for name, part in held.items()}
    return {"rounds": rounds, "kl_after": after}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    made.add_argument("models", nargs="*", metavar="NAME=FOLDER")
    made.add_argument("--teacher", default="")
    made.add_argument("--text", type=Path, nargs="+", default=[])
    made.add_argument("--held", type=Path, nargs="+", default=[])
    made.add_argument("--context", type=int, default=512)
    made.add_argument("--dtype", default="auto")
    made.add_argument("--tokens", type=int, default=32768, help="of the gradients")
    made.add_argument("--curvature-tokens", type=int, default=8192)
    made.add_argument("--projected", type=int, default=16, help="windows of step 3")
    made.add_argument("--windows", type=int, default=8, help="of each text that changes are measured on")
    made.add_argument("--rounds", type=int, default=1)
    return made


def keep(chosen: argparse.Namespace, command: str) -> None:
    """Measure the models that are named and write their figures; those of others stay."""
    path = RESULTS / "index_learning.json"
    models = json.loads(path.read_text(encoding="utf-8"))["models"] if path.is_file() else {}
    for name, _, folder in (entry.partition("=") for entry in chosen.models):
        settings = {
            key: getattr(chosen, key)
            for key in ("context", "dtype", "tokens", "curvature_tokens", "projected", "windows")
        }
        models[name] = {"command": command, **settings, **measured(Path(folder), chosen)}
        save("index_learning", "python benchmarks/index_learning.py", {"models": models})


def main() -> None:
    """Measure the models of the command line, or those of stories260K."""
    chosen = parser().parse_args()
    if bool(chosen.text) != bool(chosen.held):
        sys.exit("--text and --held belong together")
    quiet()
    own = "python benchmarks/index_learning.py"
    if chosen.models:
        # Folders lie anywhere; their names say enough.
        shown = (re.sub(r"[^ =]*/", "", part) for part in sys.argv[1:])
        return keep(chosen, shlex.join([*own.split(), *shown]))
    with tempfile.TemporaryDirectory() as scratch:
        for arguments in rows(Path(scratch)):
            keep(parser().parse_args(arguments), own)


if __name__ == "__main__":
    main()
