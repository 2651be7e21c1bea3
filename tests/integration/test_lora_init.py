"""Adapters on packed layers, with DoRA, and adapters that start from the error of the compression."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import pocketllm
from pocketllm import LoraTuneConfig
from pocketllm.errors import ConfigError, SourceError
from pocketllm.format.checkpoint import folder_bytes
from pocketllm.recover.adapter import attach_adapter, merged
from pocketllm.recover.adapter_init import low_rank, start_from_error
from pocketllm.recover.base_model import open_base
from pocketllm.recover.lora import dry_run_lora
from pocketllm.recover.lora_task import LoraTask, training_items, with_adapter
from pocketllm.recover.trainable import TrainableMatrix
from pocketllm.runtime.layers import packed_matrices
from pocketllm.source.dense_checkpoint import open_dense
from pocketllm.source.folder import load_dense
from tests import tiny
from tests.commands import digest
from tests.recovery import SENTENCE, quick_loop, stop_at

peft = pytest.importorskip("peft")

IDS = torch.arange(20)[None] + 30


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense model `m`, its compressed form `c` and a text."""
    folder = tmp_path_factory.mktemp("lora_init")
    pocketllm.compress(tiny.save(folder / "m"), tiny.calibrated(tiny.settings()), folder / "c")
    (folder / "t.txt").write_text(SENTENCE * 20)
    return folder


def config(made: Path, **changes: Any) -> LoraTuneConfig:
    values = {"steps": 3, "context": 24, "texts": (str(made / "t.txt"),), "rank": 4, "alpha": 8}
    loop = quick_loop(eval_every=3, checkpoint_every=1)
    return LoraTuneConfig(**{**values, "learning_rate": 1e-3, "loop": loop, **changes})


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()


def with_start(made: Path, init: str, **changes: Any) -> Any:
    """The base with an adapter before its first step."""
    settings, base = config(made, init=init, **changes), open_base(made / "c", None)
    model, _ = with_adapter(base, settings, "cpu")
    if init != "zero":
        sequences = [item.ids for item in training_items(base.tokenizer, settings)[0]]
        start_from_error(model, open_dense(made / "m"), sequences, weighted=init == "output_error")
    return model


@pytest.mark.parametrize("shape", [(12, 7), (7, 12)])
def test_the_approximation_is_the_best_one(shape: tuple[int, int]) -> None:
    """Against the singular value decomposition of E and of E H^(1/2), in float64."""
    torch.manual_seed(0)
    error, x = torch.randn(shape).double(), torch.randn(40, shape[1]).double() * torch.arange(1, shape[1] + 1)
    hessian = x.T @ x / 40
    for metric in (None, hessian):
        a, b = low_rank(error, 3, metric)
        values, vectors = torch.linalg.eigh(torch.eye(shape[1]).double() if metric is None else metric)
        root = vectors * values.sqrt() @ vectors.T
        best = torch.linalg.svdvals(error @ root)[3:].square().sum()
        found = ((error - b @ a) @ root).square().sum()
        torch.testing.assert_close(found, best)
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))
    a, b = low_rank(error, 20)
    torch.testing.assert_close(b @ a, error)
    assert a.shape == (20, shape[1]) and b.shape == (shape[0], 20)


@pytest.mark.parametrize("mode", ["dense", "packed"])
def test_starting_from_the_error_brings_the_output_closer_before_the_first_step(
    mode: str, made: Path
) -> None:
    with torch.no_grad():
        wanted = logits(load_dense(made / "m", torch.float32))
    gaps = {
        init: float((logits(with_start(made, init, mode=mode)) - wanted).norm())
        for init in ("zero", "error", "output_error")
    }
    assert gaps["error"] < 0.97 * gaps["zero"]
    assert gaps["output_error"] < 0.97 * gaps["zero"]


def test_the_loss_before_is_that_of_the_base_alone(made: Path, tmp_path: Path) -> None:
    plain = pocketllm.lora(made / "c", tmp_path / "zero", config(made, steps=1))
    done = pocketllm.lora(made / "c", tmp_path / "a", config(made, steps=1, init="output_error"))
    assert done.loss_before == pytest.approx(plain.loss_before, rel=1e-6)
    history = json.loads((tmp_path / "a.log" / "summary.json").read_text())["validation"]
    assert history[0][1] != pytest.approx(done.loss_before, rel=1e-4)
    assert done.adapter_bytes == folder_bytes(tmp_path / "a")


def test_a_reloaded_adapter_computes_the_same(made: Path, tmp_path: Path) -> None:
    settings = config(made, init="error", learning_rate=1e-9)
    pocketllm.lora(made / "c", tmp_path / "a", settings)
    base = open_base(made / "c", None)
    found = logits(attach_adapter(base.load("packed", "cpu"), made / "c", tmp_path / "a"))
    started = with_start(made, "error")
    gap = (found - logits(started)).norm() / (logits(started) - logits(with_start(made, "zero"))).norm()
    assert gap < 0.05  # bfloat16 of the adapter


def test_an_interrupted_run_that_starts_from_the_error_resumes(made: Path, tmp_path: Path) -> None:
    settings = config(made, init="output_error", mode="packed")
    with pytest.raises(KeyboardInterrupt):
        pocketllm.lora(made / "c", tmp_path / "a", settings, progress=stop_at(2))
    pocketllm.lora(made / "c", tmp_path / "a", settings)
    pocketllm.lora(made / "c", tmp_path / "b", settings)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_packed_weights_stay_packed_and_give_the_same_gradients(made: Path) -> None:
    gradients = []
    for mode in ("dense", "packed"):
        settings = config(made, mode=mode)
        base = open_base(made / "c", None)
        model, _ = with_adapter(base, settings, "cpu")
        if mode == "packed":
            assert not any(isinstance(m, TrainableMatrix) for m in model.modules())
            assert {m.indices.dtype for m in packed_matrices(model).values()} == {torch.uint8}
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.01)
        task = LoraTask(model, training_items(base.tokenizer, settings), settings, torch.float32)
        task.backward(torch.arange(4), 1.0)
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    for name, wanted in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], wanted, rtol=2e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("mode", ["dense", "packed"])
def test_dora_trains_loads_and_merges(mode: str, made: Path, tmp_path: Path) -> None:
    settings = config(made, dora=True, mode=mode, init="error", learning_rate=1e-2)
    planned = dry_run_lora(made / "c", settings)
    done = pocketllm.lora(made / "c", tmp_path / "a", settings)
    assert done.loss_stored < done.loss_before
    assert abs(planned["adapter_bytes"] - done.adapter_bytes) <= 12  # digits of two losses
    base = open_base(made / "c", None)
    adapted = logits(attach_adapter(base.load("packed", "cpu"), made / "c", tmp_path / "a"))
    torch.testing.assert_close(logits(merged(base, tmp_path / "a")), adapted, rtol=1e-3, atol=1e-4)
    plain = config(made, mode=mode)
    assert done.trained_parameters > dry_run_lora(made / "c", plain)["trained_parameters"]


def test_dora_starts_without_effect(made: Path) -> None:
    started = logits(with_start(made, "zero", dora=True, mode="packed"))
    torch.testing.assert_close(started, logits(with_start(made, "zero")), rtol=1e-3, atol=1e-4)


def test_another_dense_model_is_refused(made: Path, tmp_path: Path) -> None:
    settings = config(made, init="error")

    def refused(match: str, **changes: Any) -> None:
        teacher = tiny.save(tmp_path / str(len(list(tmp_path.iterdir()))), **changes)
        with pytest.raises(ConfigError, match=match):
            pocketllm.lora(made / "c", tmp_path / "o", settings, teacher=str(teacher))

    refused(
        r"is not the model .*: model\.layers.*weight is \(54, 36\), wanted \(36, 36\)", num_attention_heads=3
    )
    refused(r"it has no model\.layers\.\d\..*; name that model with --teacher", architecture="gpt_neox")
    other = tiny.model()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.neg_()
    other.save_pretrained(tmp_path / "other")
    tiny.tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(ConfigError, match=r"differs by [34].* of its squared size, wanted less than 1"):
        pocketllm.lora(made / "c", tmp_path / "o", settings, teacher=str(tmp_path / "other"))
    for call in (pocketllm.lora, lambda *a, **k: dry_run_lora(made / "c", settings, teacher=k["teacher"])):
        with pytest.raises(SourceError, match=r"the teacher of .*/c: .*name it with --teacher"):
            call(made / "c", tmp_path / "o", settings, teacher="./nowhere")
    with pytest.raises(ConfigError, match="--teacher does not apply to --method lora"):
        pocketllm.lora(made / "c", tmp_path / "o", config(made), teacher=str(made / "m"))
    with pytest.raises(ConfigError, match="init: got 'random'"):
        dataclasses.replace(settings, init="random")
