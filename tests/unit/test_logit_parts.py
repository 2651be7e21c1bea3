"""Logits in parts are those of the model, whatever it does after its head."""

from __future__ import annotations

import pytest
import torch

from pocketllm.evaluate import logits
from tests import tiny

IDS = torch.arange(3, 40)[None]


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt2", "mixtral"])
def test_parts(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model(architecture)
    with torch.inference_mode():
        wanted = model(IDS, use_cache=False).logits[0, :-1]
        ((place, full),) = logits.logit_parts(model, IDS)
        assert place == slice(0, 36) and torch.equal(full, wanted)
        monkeypatch.setattr(logits, "LOGITS_AT_ONCE", 10 * 96)
        calls: list[int] = []
        model.base_model.register_forward_hook(lambda *_: calls.append(1))
        parts = list(logits.logit_parts(model, IDS))
    assert [(part.start, part.stop) for part, _ in parts] == [(0, 10), (10, 20), (20, 30), (30, 36)]
    torch.testing.assert_close(torch.cat([value for _, value in parts]), wanted, rtol=0, atol=1e-5)
    assert "forward" not in model.base_model.__dict__
    assert torch.equal(model(IDS, use_cache=False).logits[0, :-1], wanted)


def test_a_model_that_cannot_give_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """One without `logits_to_keep` gives them all at once."""
    model = tiny.model("llama")
    monkeypatch.setattr(logits, "LOGITS_AT_ONCE", 96)
    monkeypatch.setattr(type(model), "forward", lambda self, ids, use_cache: model.model(ids), raising=True)
    model.model.forward = lambda ids: type("Out", (), {"logits": torch.zeros(1, ids.shape[1], 96)})()
    ((place, value),) = logits.logit_parts(model, IDS)
    assert place == slice(0, 36) and value.shape == (36, 96)
