"""The one evaluator: perplexity, and divergence from the dense model, of a dense folder.

    python benchmarks/peers/evaluate.py DENSE_FOLDER TEXT RESULT.json

Every peer comes here as dequantized bf16 weights in the same model class, so nothing of a peer's own kernels
or harness enters the figures. KL(dense || quantized) in nats per token: softmax in float32 of the bf16
logits, mean over the tokens that perplexity scores.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from settings import CONTEXT, MODEL, WINDOWS
from torch import Tensor

from pocketllm.evaluate.perplexity import perplexity, read_text, token_windows
from pocketllm.model.builtin import fetch


def _model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)  # in evaluation mode


@torch.inference_mode()
def mean_divergence(dense: Any, quantized: Any, windows: Tensor) -> float:
    """Mean over tokens of KL(dense || quantized) in nats; windows [count, context] of token ids."""
    total = 0.0
    for window in windows:
        p, q = (
            torch.log_softmax(model(window[None], use_cache=False).logits[0, :-1].float(), dim=-1)
            for model in (dense, quantized)
        )
        each = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        total += float(each.double().sum())
    return total / (windows.shape[0] * (windows.shape[1] - 1))


def changed_outside_blocks(dense: Any, quantized: Any) -> list[str]:
    """Parameters that are not of the transformer blocks' matrices, and differ from the dense model's."""
    other = dict(quantized.named_parameters())
    return [
        name
        for name, value in dense.named_parameters()
        if (value.dim() < 2 or ".layers." not in name) and not torch.equal(value, other[name])
    ]


def evaluate(folder: Path, text: str) -> dict[str, Any]:
    """Both figures of one model.

    Raises:
        ValueError: embedding or head are not the dense ones.
    """
    from transformers import AutoTokenizer

    reference = fetch(MODEL)
    tokenizer = AutoTokenizer.from_pretrained(reference)
    dense, quantized = _model(reference), _model(folder)
    changed = changed_outside_blocks(dense, quantized)
    if any("embed" in name or "lm_head" in name for name in changed):
        raise ValueError(f"{folder}: the embedding is not the dense model's, which every peer is to keep")
    found = perplexity(quantized, tokenizer, text, CONTEXT, WINDOWS)
    windows = token_windows(tokenizer, text, CONTEXT, WINDOWS)
    return {
        "perplexity": found.perplexity,
        "kl_nats": mean_divergence(dense, quantized, windows),
        "tokens": found.tokens,
        "changed_outside_blocks": len(changed),
    }


def main() -> None:
    """Evaluate the folder that the command line names."""
    folder, text, result = map(Path, sys.argv[1:4])
    torch.manual_seed(0)
    values = evaluate(folder, read_text(text))
    result.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(values))


if __name__ == "__main__":
    main()
