"""What other code in the process has set in torch has no influence, and is left as it is."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import pocketllm
from pocketllm.config import LoopConfig
from pocketllm.errors import FormatError
from pocketllm.evaluate import verify_compressed
from pocketllm.evaluate.kl import text_divergence
from pocketllm.report import html_report
from tests import recovery, tiny

IDS = torch.arange(3, 40)[None]
LOOP = LoopConfig(batch_size=2, eval_every=1)
QUICK = {"tokens": 64, "context": 32, "sensitivity_tokens": 32}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "default bfloat16": lambda: default_dtype(torch.bfloat16),
    "default float64": lambda: default_dtype(torch.float64),
    "device meta": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": deterministic,
}


def state() -> tuple[object, ...]:
    return (
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.are_deterministic_algorithms_enabled(),
    )


@contextmanager
def all_at_once() -> Iterator[None]:
    with ExitStack() as stack:
        for name in ("deterministic", "default bfloat16", "inference_mode", "device meta", "autocast"):
            stack.enter_context(SURROUNDINGS[name]())
        yield


def test_what_is_frozen_stays_so_and_nothing_else(small: Path, tmp_path: Path) -> None:
    pocketllm.load(small)
    (small_config := tmp_path / "config.json").write_text((small / "config.json").read_text())
    with pytest.raises(FormatError):
        pocketllm.load(small_config.parent)
    assert not gc.get_freeze_count()
    gc.freeze()
    try:
        pocketllm.load(small)
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_compression(name: str, source: Path, small: Path, tmp_path: Path) -> None:
    with SURROUNDINGS[name]():
        before = state()
        planned = pocketllm.dry_run(source, tiny.settings())
        made = pocketllm.compress(source, tiny.settings(), tmp_path / "out")
        assert state() == before
    assert planned.bytes_on_disk == made.bytes_on_disk
    for file in ("model.safetensors", "config.json", "pocketllm.json"):
        assert (tmp_path / "out" / file).read_bytes() == (small / file).read_bytes()


def test_calibrated_compression(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tiny.save(tmp_path / "dense", num_hidden_layers=1)
    config = tiny.on_trellis(calibration=QUICK)
    pocketllm.compress(source, config, tmp_path / "plain")
    monkeypatch.setenv("POCKETLLM_CACHE", str(tmp_path / "cache"))  # measured again
    with all_at_once():
        pocketllm.compress(source, config, tmp_path / "out")
    for file in ("model.safetensors", "config.json", "pocketllm.json"):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_running(name: str, small: Path, text: Path, tmp_path: Path) -> None:
    dense, tokenizer = pocketllm.load(small, mode="dense")
    packed, _ = pocketllm.load(small, mode="packed")
    words = text.read_text()

    def use(model: Any) -> tuple[object, ...]:
        return (
            verify_compressed(model),
            pocketllm.perplexity(model, tokenizer, words, context=16).perplexity,
            text_divergence(model, dense, tokenizer, words, context=16).kl,
            pocketllm.generate(model, tokenizer, "hello", max_new_tokens=4).text,
        )

    wanted, weight = {"dense": use(dense), "packed": use(packed)}, dense.lm_head.weight
    with SURROUNDINGS[name]():
        before = state()
        for mode in ("dense", "packed"):
            loaded, _ = pocketllm.load(small, mode=mode)
            assert loaded.lm_head.weight.dtype == torch.float32
            assert loaded.lm_head.weight.device.type == "cpu"
            assert torch.equal(loaded.lm_head.weight.cpu(), weight)
            assert use(loaded) == wanted[mode]
        pocketllm.export(small, tmp_path / "dense", torch.float32)
        assert state() == before
        assert torch.equal(packed.lm_head.weight, weight)  # decoded within
    hidden = packed.model(IDS, use_cache=False).last_hidden_state  # what was decoded within can be trained on
    loss = packed.lm_head(hidden.requires_grad_()).sum()
    loss.backward()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = recovery.make(tmp_path_factory.mktemp("recovery"))
    pocketllm.distill(folder / "c", folder / "plain", recovery.config(folder, steps=2))
    return folder


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_recovery(name: str, made: Path, tmp_path: Path) -> None:
    with SURROUNDINGS[name]():
        before = state()
        pocketllm.distill(made / "c", tmp_path / "out", recovery.config(made, steps=2))
        assert state() == before
    plain = (made / "plain" / "model.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == plain


@pytest.mark.parametrize("name", ["autocast", "device meta"])
def test_adapters_and_pages(name: str, small: Path, source: Path, text: Path, tmp_path: Path) -> None:
    """Autocast keeps casts of parameters as long as the outermost one lasts; an optimizer changes them meanwhile."""
    pytest.importorskip("peft")
    config = pocketllm.LoraTuneConfig(
        texts=(str(text),), rank=2, alpha=4, steps=2, validation_items=2, context=16, loop=LOOP
    )

    def use() -> tuple[float, str]:
        place = tmp_path / str(len(list(tmp_path.iterdir())))
        place.mkdir()
        done = pocketllm.lora(small, place / "adapter", config)
        html_report(small, tmp_path / "page.html", against=str(source))
        return done.loss_stored, (tmp_path / "page.html").read_text()

    wanted = use()
    with SURROUNDINGS[name]():
        before = state()
        assert use() == wanted
        assert state() == before
