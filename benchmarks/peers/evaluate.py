"""The one evaluator: perplexity, and divergence from the dense model, of a dense folder.

    python benchmarks/peers/evaluate.py MODEL DENSE_FOLDER TEXT RESULT.json LOGITS_FOLDER

Every peer comes here as dequantized bf16 weights in the same model class, so nothing of a peer's own kernels
or harness enters the figures. One forward pass gives both. KL(dense || quantized) in nats per token: softmax
in float32 of the bf16 logits, mean over the tokens that perplexity scores. The dense model is evaluated
first, and leaves its logits in LOGITS_FOLDER.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pocketllm.evaluate.perplexity import perplexity
from pocketllm.source.builtin import fetch
from pocketllm.text.read import read_text

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import CONTEXT, SUBJECTS, Subject

ROWS_AT_ONCE = 256  # of [tokens, vocabulary] float32


class Observed:
    """A model that `perplexity` can call; hands the logits of each window, in turn, to `look`."""

    def __init__(self, model: Any) -> None:
        self.model, self.config, self.device = model, model.config, model.device
        self.window = 0

    def get_input_embeddings(self) -> Any:
        """The model's, by which `perplexity` knows its vocabulary."""
        return self.model.get_input_embeddings()

    def __call__(self, ids: Tensor, **options: Any) -> Any:
        """As the model; ids [1, context]."""
        output = self.model(ids, **options)
        self.look(self.window, output.logits[0, :-1])
        self.window += 1
        return output

    def look(self, window: int, logits: Tensor) -> None:
        """What is done with logits [context - 1, vocabulary]."""
        raise NotImplementedError


class Recorder(Observed):
    """Saves the logits."""

    def __init__(self, model: Any, folder: Path) -> None:
        super().__init__(model)
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def look(self, window: int, logits: Tensor) -> None:
        """Save a window's, as they are."""
        torch.save(logits.clone(), self.folder / f"{window}.pt")


class Divergence(Observed):
    """Adds up KL(recorded || model) over the tokens."""

    def __init__(self, model: Any, folder: Path) -> None:
        super().__init__(model)
        self.folder = folder
        self.total, self.tokens = 0.0, 0

    def look(self, window: int, logits: Tensor) -> None:
        """Compare with the recorded logits of the same window."""
        recorded = torch.load(self.folder / f"{window}.pt", mmap=True, weights_only=True)
        for ours, dense in zip(logits.split(ROWS_AT_ONCE), recorded.split(ROWS_AT_ONCE), strict=True):
            p, q = (torch.log_softmax(part.float(), dim=-1) for part in (dense, ours))
            self.total += float(torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True))
            self.tokens += len(ours)


def changed_outside_blocks(dense: Any, quantized: Any) -> list[str]:
    """Parameters that are not of the transformer blocks' matrices, and differ from the dense model's."""
    other = dict(quantized.named_parameters())
    return [
        name
        for name, value in dense.named_parameters()
        if (value.dim() < 2 or ".layers." not in name) and not torch.equal(value, other[name])
    ]


def evaluate(subject: Subject, folder: Path, text: str, logits: Path) -> dict[str, Any]:
    """Both figures of one model.

    Raises:
        ValueError: embedding or head are not the dense ones.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reference = fetch(subject.source)
    tokenizer = AutoTokenizer.from_pretrained(reference)
    dense, model = (
        AutoModelForCausalLM.from_pretrained(f, dtype=torch.bfloat16) for f in (reference, folder)
    )
    if folder.samefile(reference):
        found = perplexity(Recorder(dense, logits), tokenizer, text, CONTEXT, subject.windows)
        return {"perplexity": found.perplexity, "tokens": found.tokens}
    changed = changed_outside_blocks(dense, model)
    if any("embed" in name or "lm_head" in name for name in changed):
        raise ValueError(f"{folder}: the embedding is not the dense model's, which every peer is to keep")
    observed = Divergence(model, logits)
    found = perplexity(observed, tokenizer, text, CONTEXT, subject.windows)
    return {
        "perplexity": found.perplexity,
        "kl_nats": observed.total / observed.tokens,
        "tokens": found.tokens,
        "changed_outside_blocks": len(changed),
    }


def main() -> None:
    """Evaluate the folder that the command line names."""
    folder, text, result, logits = map(Path, sys.argv[2:6])
    values = evaluate(SUBJECTS[sys.argv[1]], folder, read_text(text), logits)
    result.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(values))


if __name__ == "__main__":
    main()
