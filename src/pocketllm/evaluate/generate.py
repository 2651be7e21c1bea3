"""Continue a prompt with a model, and measure the speed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch

from pocketllm.errors import ConfigError
from pocketllm.files import is_utf8
from pocketllm.text.vocabulary import check_tokens
from pocketllm.torch_state import in_default_torch_state


@dataclass(frozen=True)
class Generation:
    """Generated text.

    text: prompt and continuation. tokens: number of new tokens. tokens_per_second: new tokens per second of wall time.
    """

    text: str
    tokens: int
    tokens_per_second: float


@in_default_torch_state
def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 40,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
) -> Generation:
    """Continue `prompt`; greedy at temperature 0.

    Args:
        chat: apply the tokenizer's chat template to the prompt.

    Raises:
        ConfigError: a prompt that is empty or no Unicode text, a temperature below 0, fewer than 1 new token, or no
            chat template.
        SourceError: as `check_tokens`.
    """
    if not prompt.strip():
        raise ConfigError("prompt: is empty; give some text to continue")
    if not is_utf8(prompt):
        raise ConfigError(f"prompt: got {prompt!a}, which is not UTF-8; encode it, or run in a UTF-8 locale")
    if max_new_tokens < 1 or temperature < 0:
        raise ConfigError(
            f"got max_new_tokens={max_new_tokens}, temperature={temperature}; wanted at least 1 and 0"
        )
    if chat:
        if not getattr(tokenizer, "chat_template", None):
            raise ConfigError("chat: this model's tokenizer has no chat template; leave --chat out")
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    ids = inputs["input_ids"].to(model.device)
    check_tokens(model, ids)
    pad = tokenizer.pad_token_id
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    torch.manual_seed(seed)
    started = time.perf_counter()
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            pad_token_id=tokenizer.eos_token_id if pad is None else pad,
            **sampling,
        )
    seconds = time.perf_counter() - started
    new = out.shape[1] - ids.shape[1]
    text = tokenizer.decode(out[0], skip_special_tokens=True)
    return Generation(text=text, tokens=new, tokens_per_second=new / seconds)
