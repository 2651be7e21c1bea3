"""Texts that a model writes without a prompt: for calibration where no text like its future inputs is at hand."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from pocketllm.config import SampleConfig
from pocketllm.errors import ConfigError, OutputError, reason_of
from pocketllm.evaluate.generate import Sampling
from pocketllm.format.output_file import check_target
from pocketllm.text.vocabulary import positions_of
from pocketllm.torch_state import in_default_torch_state


@in_default_torch_state
def sample_texts(
    model: Any,
    tokenizer: Any,
    output: Path,
    config: SampleConfig | None = None,
    identity: str = "",
    on_progress: Callable[[float], None] = lambda share: None,
    overwrite: bool = False,
) -> int:
    """Write texts that start at the token that begins (or else ends) a text, as JSON lines `{"text": ...}`.

    What is finished is kept in a hidden file next to the output, with which a later call goes on.

    Args:
        identity: of the model; what another one wrote is not continued.
        on_progress: called with the finished share. overwrite: replace a file.

    Returns:
        The number of texts.

    Raises:
        ConfigError: no token to begin with. OutputError: as `check_free`, or it cannot be written.
    """
    config = config or SampleConfig()
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise ConfigError(
            "sample: the tokenizer has no token that begins or ends a text; write a text with generate"
        )
    check_free(output, overwrite)
    length = min(config.length, (positions_of(model.config) or config.length + 1) - 1)
    count = -(-config.tokens // length)
    key = hashlib.sha256(repr((identity, asdict(config), start, length)).encode()).hexdigest()[:8]
    kept = output.with_name(f".{output.name}.{key}.partial")
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        done = _complete_lines(kept, config.batch)
        while done < count:
            texts = min(config.batch, count - done)
            torch.manual_seed(config.seed + done)
            share = _Share(on_progress, length, done / count, texts / count)
            rows = _batch(model, tokenizer, torch.full((texts, 1), start), length, config.temperature, share)
            with kept.open("a", encoding="utf-8") as stream:
                stream.writelines(json.dumps({"text": row}, ensure_ascii=False) + "\n" for row in rows)
                stream.flush()
                os.fsync(stream.fileno())
            done += texts
        kept.replace(output)
    except OSError as error:
        raise OutputError(
            f"{output}: cannot be written ({reason_of(error)}); what is done is kept in {kept}: run it again"
        ) from error
    return count


def check_free(output: Path, overwrite: bool) -> None:
    """Check before any work that a file can be written.

    Raises:
        OutputError: it exists and is not to be replaced, or as `check_target`.
    """
    check_target(output)
    if output.exists() and not overwrite:
        raise OutputError(f"{output}: exists; choose another name, or --overwrite")


def _batch(
    model: Any, tokenizer: Any, start: torch.Tensor, length: int, temperature: float, share: StoppingCriteria
) -> list[str]:
    """Texts of `length` tokens after `start` [texts, 1]."""
    with torch.inference_mode():
        ids = model.generate(
            start.to(model.device),
            attention_mask=torch.ones_like(start).to(model.device),
            min_new_tokens=length,
            max_new_tokens=length,
            pad_token_id=int(start[0]),
            stopping_criteria=StoppingCriteriaList([share]),
            **Sampling(temperature).options(),
        )
    found: list[str] = tokenizer.batch_decode(ids, skip_special_tokens=True)
    return found


class _Share(StoppingCriteria):
    """Tells how much is generated while a batch is: begin + part of it * weight. Stops nothing."""

    def __init__(
        self, on_progress: Callable[[float], None], length: int, begin: float, weight: float
    ) -> None:
        self.on_progress, self.length, self.begin, self.weight = on_progress, length, begin, weight

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.on_progress(self.begin + self.weight * (input_ids.shape[1] - 1) / self.length)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _complete_lines(kept: Path, batch: int) -> int:
    """Number of texts of complete batches in an earlier call's file, which is cut after them."""
    if not kept.is_file():
        return 0
    lines = kept.read_bytes().splitlines(keepends=True)
    complete = sum(line.endswith(b"\n") for line in lines) // batch * batch
    os.truncate(kept, sum(map(len, lines[:complete])))
    return complete
