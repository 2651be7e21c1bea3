"""Models that stay packed: nothing is decoded, results are those of dense layers, and when that is chosen."""

from __future__ import annotations

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import StaticCache

import pocketllm
from pocketllm.codec.kernels import select
from pocketllm.runtime.layers import PackedMatrix
from pocketllm.runtime.packed_forward import PackedConv1D, PackedEmbedding, PackedLinear
from tests import tiny
from tests.packed_weights import needs_compiler

ROUNDING = 1e-5
TOKENS = torch.arange(3, 40)[None]


def compressed(folder: Path, architecture: str = "llama", **changes: Any) -> Path:
    config = tiny.on_trellis() if not changes else tiny.settings(**changes)
    pocketllm.compress(tiny.save(folder / "dense", architecture), config, folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compressed(tmp_path_factory.mktemp("packed"))


@pytest.fixture
def _never_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(matrix: PackedMatrix) -> None:
        raise AssertionError(f"decoded: {matrix.entry}")

    monkeypatch.setattr(PackedMatrix, "forward", decode)


def logits(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    with torch.inference_mode():
        found: torch.Tensor = model(tokens, use_cache=False).logits
    return found


def is_packed(model: Any) -> bool:
    return any(isinstance(module, PackedMatrix) for module in model.modules())


@pytest.fixture(scope="module", params=["llama", "gpt2", "gpt_neox", "phi", "gemma3", "mixtral", "gpt_oss"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed model of each architecture."""
    return compressed(tmp_path_factory.mktemp(request.param), request.param)


@needs_compiler
@pytest.mark.parametrize("tokens", [1, 2, 37])
def test_packed_by_default_and_as_dense(folder: Path, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dense, _ = pocketllm.load(folder, mode="dense", dtype=torch.float32)
    model, _ = pocketllm.load(folder, dtype=torch.float32)
    assert is_packed(model) and not is_packed(dense)
    wanted = logits(dense, TOKENS[:, :tokens])
    monkeypatch.setattr(PackedMatrix, "forward", None)  # nothing decodes a matrix
    torch.testing.assert_close(logits(model, TOKENS[:, :tokens]), wanted, rtol=0, atol=ROUNDING)


@needs_compiler
@pytest.mark.usefixtures("_never_decoded")
def test_loading_decodes_nothing_and_generating_neither(llama: Path) -> None:
    model, tokenizer = pocketllm.load(llama)
    prompt = tokenizer("hello", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] > 1
    kinds = {type(m).__mro__[2] for m in model.modules() if hasattr(type(m), "_dense_class")}
    assert kinds == {PackedLinear, PackedEmbedding}
    assert not any(parameter.ndim > 1 for parameter in model.parameters())


@pytest.mark.parametrize(
    ("architecture", "changes", "reason"),
    [
        ("llama", {"codec": {"decoder": "row"}}, "whose decoder has row statistics"),
    ],
)
@needs_compiler
def test_auto_is_dense_where_a_layer_has_no_kernel(
    architecture: str, changes: Any, reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = pocketllm.load(compressed(tmp_path, architecture, **changes))
    assert not is_packed(model)
    (line,) = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert "is decoded at load, as in mode dense" in line and reason in line


@needs_compiler
@pytest.mark.parametrize("codec", [{"norm": "none"}, {"norm": "ln"}, {"depth": 1}])
def test_published_form_without_row_statistics_runs_packed(
    codec: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = compressed(tmp_path, codec={"decoder": "row", **codec})
    dense, _ = pocketllm.load(folder, mode="dense", dtype=torch.float32)
    wanted = logits(dense)
    monkeypatch.setattr(PackedMatrix, "forward", lambda matrix: pytest.fail(f"decoded: {matrix.entry}"))
    packed, _ = pocketllm.load(folder, dtype=torch.float32)
    assert is_packed(packed)
    torch.testing.assert_close(logits(packed), wanted, rtol=0, atol=ROUNDING)


def test_auto_is_dense_without_kernels(
    llama: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(select, "packed_isa", lambda: None)
    model, _ = pocketllm.load(llama)
    assert not is_packed(model) and "no C++ compiler was found, or POCKETLLM_COMPILE=0" in caplog.text
    dense = logits(model)
    packed, _ = pocketllm.load(llama, mode="packed")  # in torch
    torch.testing.assert_close(logits(packed), dense, rtol=0, atol=ROUNDING)


def test_gradients_flow_through_packed_layers(llama: Path) -> None:
    dense, _ = pocketllm.load(llama, mode="dense", dtype=torch.float32)
    packed, _ = pocketllm.load(llama, mode="packed", dtype=torch.float32)
    start, found = dense.model.embed_tokens(TOKENS).detach(), []
    for model in (dense, packed):
        x = start.clone().requires_grad_()
        model(inputs_embeds=x, use_cache=False).logits.square().sum().backward()
        found.append(x.grad)
    assert found[0] is not None and found[1] is not None
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


def test_packed_layers_compile_and_export(llama: Path) -> None:
    model, _ = pocketllm.load(llama, mode="packed", dtype=torch.float32)
    layer, x = model.model.layers[0].mlp.up_proj, torch.randn(3, 36)
    wanted = layer(x)
    assert torch.equal(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), wanted)
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), wanted, rtol=0, atol=ROUNDING)


def test_a_packed_model_compiles_for_generate(llama: Path) -> None:
    """As one graph with a static cache, as `generate` compiles models whose quantizer allows it."""
    model, _ = pocketllm.load(llama, mode="packed", dtype=torch.float32)
    assert model.hf_quantizer.is_compileable
    compiled = torch.compile(model.forward, backend="eager", fullgraph=True, dynamic=False)
    found = []
    for forward in (model.forward, compiled):
        cache = StaticCache(config=model.config, max_cache_len=8)
        with torch.no_grad():
            found.append(
                [forward(token, past_key_values=cache).logits for token in TOKENS[:, :2].split(1, 1)]
            )
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=ROUNDING)


def test_copies_of_packed_layers_run_on_their_own(llama: Path) -> None:
    model, _ = pocketllm.load(llama, mode="packed", dtype=torch.float32)
    wanted = logits(model)
    again = copy.deepcopy(model)
    del model
    assert torch.equal(logits(again), wanted)
    matrix = next(m for m in again.modules() if isinstance(m, PackedMatrix))
    assert torch.equal(pickle.loads(pickle.dumps(matrix))(), matrix())


def test_changed_tensors_are_used_and_other_dtypes_computed_in(llama: Path) -> None:
    model, _ = pocketllm.load(llama, mode="packed", dtype=torch.float32)
    wanted = logits(model)
    model.bfloat16()
    assert logits(model).dtype == torch.bfloat16
    torch.testing.assert_close(logits(model).float(), wanted, rtol=0, atol=0.05)
    model.to(torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model.model.layers[0].mlp.up_proj(torch.randn(1, 36)).dtype == torch.bfloat16
    packed = model.model.layers[0].mlp.up_proj._modules["packed_weight"]
    before = logits(model)
    packed.row_scale = packed.row_scale * 2
    assert not torch.equal(logits(model), before)


def test_conv1d_multiplies_by_its_transpose(tmp_path: Path) -> None:
    model, _ = pocketllm.load(compressed(tmp_path, "gpt2"), mode="packed", dtype=torch.float32)
    layer, x = model.transformer.h[0].mlp.c_fc, torch.randn(2, 36)
    assert isinstance(layer, PackedConv1D)
    torch.testing.assert_close(layer(x), x @ layer.weight + layer.bias, rtol=0, atol=ROUNDING)
