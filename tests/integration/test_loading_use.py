"""What people do with loaded models: train adapters, copy, pickle, export, resize."""

from __future__ import annotations

import io
import pickle
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pocketllm
from pocketllm.errors import OutputError
from pocketllm.format import verify
from pocketllm.runtime.layers import packed_matrices
from tests import tiny

IDS = torch.arange(3, 40)[None]
MODES = ["dense", "packed"]


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("untied")
    pocketllm.compress(
        tiny.save(folder / "dense", tie_word_embeddings=False), tiny.settings(), folder / "out"
    )
    return folder / "out"


ROUNDING = 1e-5  # between products with packed and with decoded weights, in float32


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS, use_cache=False).logits
    return found


@pytest.mark.parametrize("mode", MODES)
def test_adapters_train_under_the_trainer(mode: str, small: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    import transformers as t

    model, _ = pocketllm.load(small, mode=mode)
    before = logits(model)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    settings = t.TrainingArguments(
        str(tmp_path), max_steps=2, learning_rate=0.1, report_to=[], use_cpu=True, save_strategy="no"
    )
    data = [{"input_ids": IDS[0], "labels": IDS[0]}] * 4
    t.Trainer(adapted, settings, train_dataset=data).train()  # type: ignore[arg-type]
    assert not torch.equal(logits(adapted), before)
    with adapted.disable_adapter():
        assert torch.equal(logits(adapted), before)


def test_the_trainer_refuses_a_model_without_adapters(small: Path, tmp_path: Path) -> None:
    import transformers as t

    model, _ = pocketllm.load(small)
    settings = t.TrainingArguments(str(tmp_path), report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match="adapters"):
        t.Trainer(model, settings)


def saved(model: Any) -> Any:
    stream = io.BytesIO()
    torch.save(model, stream)
    return torch.load(io.BytesIO(stream.getvalue()), weights_only=False)


@pytest.mark.parametrize("mode", MODES)
def test_a_model_with_a_report_is_not_saved_over(mode: str, copy: Path) -> None:
    model, _ = pocketllm.load(copy, mode=mode)
    with pytest.raises(OutputError, match="contains a model with a report"):
        model.save_pretrained(save_directory=str(copy))
    verify(copy)
    (copy / "pocketllm.json").unlink()
    model.save_pretrained(copy)
    assert torch.equal(logits(pocketllm.load(copy, mode=mode)[0]), logits(model))


@pytest.mark.parametrize("duplicate", [deepcopy, saved, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("mode", MODES)
def test_copies_compute_the_same(mode: str, duplicate: Any, small: Path, tmp_path: Path) -> None:
    model, _ = pocketllm.load(small, mode=mode)
    before = logits(model)  # fills caches that no copy must share
    made = duplicate(model)
    assert torch.equal(logits(made), before)
    assert made.get_input_embeddings() is not model.get_input_embeddings()
    for name, matrix in packed_matrices(made).items():
        assert matrix is not packed_matrices(model)[name]
        assert matrix._store[0] is made.pocketllm
    made.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(pocketllm.load(tmp_path / "again", mode=mode)[0]), before)
    made.resize_token_embeddings(100)
    assert model.get_input_embeddings().weight.shape[0] == 96


def test_state_dicts_have_the_stored_names(small: Path) -> None:
    model, _ = pocketllm.load(small, mode="packed")
    state = model.state_dict()
    assert "model.layers.0.mlp.up_proj.weight.indices" in state
    assert not any("packed_" in name for name in state)
    again, _ = pocketllm.load(small, mode="packed")
    with torch.no_grad():
        for buffer in again.buffers():
            buffer.zero_()
    again.load_state_dict(state, strict=False)
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


@pytest.mark.parametrize("mode", MODES)
def test_export(mode: str, small: Path) -> None:
    model, _ = pocketllm.load(small, mode=mode)
    program = torch.export.export(model, (IDS,), {"use_cache": False}, strict=False)
    with torch.no_grad():
        found = program.module()(IDS, use_cache=False).logits
    assert torch.allclose(found, logits(model), atol=1e-5)
    if mode == "packed":
        assert "pocketllm.decode" in str(program.graph)
        held = sum(value.numel() * value.element_size() for value in program.state_dict.values())
        assert held < sum(p.numel() * 2 for p in pocketllm.load(small, mode="dense")[0].parameters())


@pytest.mark.parametrize("row_scale", [True, False])
def test_the_exported_operation_decodes_every_form(row_scale: bool, tmp_path: Path) -> None:
    from pocketllm.runtime.decode_op import decode

    settings = tiny.settings(codec={"row_scale": row_scale})
    pocketllm.compress(tiny.save(tmp_path / "dense"), settings, tmp_path / "out")
    model, _ = pocketllm.load(tmp_path / "out", mode="packed")
    for matrix in packed_matrices(model).values():
        assert torch.equal(decode(matrix), matrix())


@pytest.mark.parametrize("size", [100, 80])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tied", [True, False])
def test_resized_embeddings(
    tied: bool, mode: str, size: int, small: Path, untied: Path, tmp_path: Path
) -> None:
    model, tokenizer = pocketllm.load(small if tied else untied, mode=mode)
    known = min(size, 96)
    before = logits(model)
    model.resize_token_embeddings(size)
    assert model.config.vocab_size == size
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied
    after = logits(model)
    assert after.shape[-1] == size
    torch.testing.assert_close(after[..., :known], before[..., :known], rtol=0, atol=ROUNDING)
    model.save_pretrained(tmp_path / "again")
    tokenizer.save_pretrained(tmp_path / "again")
    for again in MODES:
        loaded, _ = pocketllm.load(tmp_path / "again", mode=again)
        torch.testing.assert_close(logits(loaded), after, rtol=0, atol=ROUNDING)
    assert not any("embed" in name or "head" in name for name in packed_matrices(loaded))
    assert len(packed_matrices(loaded)) == 14


@pytest.mark.parametrize("tied", [True, False])
def test_a_size_that_stays_changes_nothing(tied: bool, small: Path, untied: Path) -> None:
    model, _ = pocketllm.load(small if tied else untied, mode="packed")
    before, packed = logits(model), set(packed_matrices(model))
    model.resize_token_embeddings(96)
    model.resize_token_embeddings(pad_to_multiple_of=8)
    model.resize_token_embeddings()
    model.tie_weights()
    assert torch.equal(logits(model), before) and set(packed_matrices(model)) == packed
    model.resize_token_embeddings(97, pad_to_multiple_of=8)
    assert model.get_input_embeddings().weight.shape[0] == 104
