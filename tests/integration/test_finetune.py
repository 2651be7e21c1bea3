"""Recovery on tiny models: what it promises about accuracy, bytes, resumption and bad input."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import pocketllm
from pocketllm import DistillConfig, LoopConfig
from pocketllm.errors import ConfigError, FormatError, OutputError, ResumeError, SourceError, TrainingError
from pocketllm.format.checkpoint import folder_bytes, read_report
from pocketllm.format.rewrite import stored_sizes
from pocketllm.format.workspace import locked
from pocketllm.recover.distill_task import Distillation
from pocketllm.recover.loop import Loop
from pocketllm.recover.teacher import LiveTeacher, open_teacher
from tests import tiny
from tests.commands import digest
from tests.recovery import config, make, stop_at


def logits(folder: Path, mode: str = "dense") -> torch.Tensor:
    model, _ = pocketllm.load(folder, mode=mode, dtype=torch.float32)
    return model(torch.arange(20)[None] + 30).logits.detach()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("recover"))


def test_distillation_lowers_the_divergence_and_keeps_bytes_and_indices(made: Path, tmp_path: Path) -> None:
    before = digest(made / "c")
    done = pocketllm.distill(made / "c", tmp_path / "o", config(made))
    assert done.kl_stored < 0.95 * done.kl_before
    assert done.kl_stored == pytest.approx(done.loss_best, rel=0.02)
    assert digest(made / "c") == before
    assert stored_sizes(tmp_path / "o")[0] == stored_sizes(made / "c")[0]
    report = read_report(tmp_path / "o")
    assert report["bytes_on_disk"] == folder_bytes(tmp_path / "o") == done.bytes_on_disk
    assert report["recover"]["method"] == "distill"
    assert sum(report["bytes_by_part"].values()) == report["bytes_on_disk"]
    from safetensors import safe_open

    with (
        safe_open(made / "c" / "model.safetensors", "pt") as old,
        safe_open(tmp_path / "o" / "model.safetensors", "pt") as new,
    ):
        indices = [key for key in new.keys() if key.endswith(".indices")]  # noqa: SIM118
        assert indices
        assert all(torch.equal(old.get_tensor(key), new.get_tensor(key)) for key in indices)
    log = tmp_path / "o.log"
    assert [json.loads(line)["step"] for line in (log / "steps.jsonl").read_text().splitlines()] == list(
        range(1, 9)
    )
    assert json.loads((log / "summary.json").read_text())["kl_stored"] == done.kl_stored
    assert (log / "curve.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((log / "summary.json").read_text())
    assert summary["arguments"]["steps"] == 8 and summary["machine"]["versions"]["torch"]
    seconds = sum(json.loads(line)["seconds"] for line in (log / "steps.jsonl").read_text().splitlines())
    assert summary["seconds"] == done.seconds >= seconds - 0.1
    assert not (tmp_path / "o.partial").exists()


def test_the_reported_divergence_is_that_of_the_loaded_model(made: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from pocketllm.recover.distill_task import training_windows

    settings = config(made, steps=2)
    done = pocketllm.distill(made / "c", tmp_path / "o", settings)
    for mode in ("dense", "packed"):
        model, tokenizer = pocketllm.load(tmp_path / "o", mode=mode, dtype=torch.float32)
        windows = training_windows(tokenizer, settings)[1]
        teacher = AutoModelForCausalLM.from_pretrained(made / "m", dtype=torch.float32)
        with torch.no_grad():
            wanted, found = (m(windows).logits.log_softmax(-1) for m in (teacher, model))
        kl = float((wanted.exp() * (wanted - found)).sum(-1).mean())
        assert kl == pytest.approx(done.kl_stored, rel=1e-3)


@pytest.mark.parametrize("architecture", ["gpt2", "mixtral", "gemma", "gpt_neox"])
def test_every_architecture_is_distilled(architecture: str, made: Path, tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "m", architecture)
    pocketllm.compress(source, tiny.calibrated(tiny.settings()), tmp_path / "c")
    done = pocketllm.distill(tmp_path / "c", tmp_path / "o", config(made, steps=4))
    assert done.kl_stored < done.kl_before


@pytest.mark.parametrize("codec", [{"decoder": "row"}, {"row_scale": False}, {"hidden": 0}, {"depth": 0}])
def test_other_forms_are_distilled(codec: dict[str, Any], made: Path, tmp_path: Path) -> None:
    pocketllm.compress(made / "m", tiny.settings(codec=codec), tmp_path / "c")
    done = pocketllm.distill(tmp_path / "c", tmp_path / "o", config(made, steps=4))
    assert done.kl_stored < done.kl_before
    assert ("row scales" in done.trained_parameters) == codec.get("row_scale", True)


@pytest.mark.parametrize("source", ["fit", "hashed", "seed"])
def test_overlapping_indices_are_distilled(source: str, made: Path, tmp_path: Path) -> None:
    width = 9 if source == "hashed" else 6
    codec = {"trellis_width": width, "codebook_source": source, "max_sample": 1 << 12}
    settings = tiny.target(4.5, codec=codec)
    pocketllm.compress(made / "m", tiny.calibrated(settings), tmp_path / "c")
    done = pocketllm.distill(tmp_path / "c", tmp_path / "o", config(made, steps=4))
    assert done.kl_stored < done.kl_before
    assert ("codebooks" in done.trained_parameters) == (source != "seed")


@pytest.mark.parametrize("step", [1, 4, 8])
def test_an_interrupted_run_resumes_to_the_same_bytes(step: int, made: Path, tmp_path: Path) -> None:
    direct = pocketllm.distill(made / "c", tmp_path / "direct", config(made))
    with pytest.raises(KeyboardInterrupt):
        pocketllm.distill(made / "c", tmp_path / "o", config(made), progress=stop_at(step))
    assert not (tmp_path / "o").exists()
    details: list[str] = []
    done = pocketllm.distill(
        made / "c", tmp_path / "o", config(made), progress=lambda e: details.append(e.detail)
    )
    assert digest(tmp_path / "o") == digest(tmp_path / "direct")
    assert (done.kl_before, done.loss_best) == (direct.kl_before, direct.loss_best)
    assert not any(f"step {step - step % 3} " in line for line in details)  # before the last checkpoint


def test_other_arguments_do_not_continue_a_run(made: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        pocketllm.distill(made / "c", tmp_path / "o", config(made), progress=stop_at(4))
    with pytest.raises(ResumeError, match=r"lr_scale: 0.001 then, 0.002 now"):
        pocketllm.distill(made / "c", tmp_path / "o", config(made, lr_scale=2e-3))


def test_parts_of_a_batch_add_up(made: Path, tmp_path: Path) -> None:
    found = [
        pocketllm.distill(made / "c", tmp_path / f"o{n}", config(made, steps=4, loop=loop)).loss_best
        for n, loop in enumerate([{}, {"micro_batch": 1}, {"gradient_checkpointing": True}])
    ]
    assert found[1:] == pytest.approx([found[0]] * 2, rel=1e-3)


def test_bfloat16_and_cached_teacher_lower_it_too(made: Path, tmp_path: Path) -> None:
    for n, changes in enumerate([{"loop": {"dtype": "bfloat16"}}, {"teacher_top_k": 8}]):
        done = pocketllm.distill(made / "c", tmp_path / f"o{n}", config(made, **changes))
        assert done.kl_stored < done.kl_before


def test_it_stops_early_and_keeps_the_best(made: Path, tmp_path: Path) -> None:
    bad = config(made, steps=40, lr_codebook=3.0, loop={"patience": 2, "eval_every": 1, "warmup": 0.0})
    done = pocketllm.distill(made / "c", tmp_path / "o", bad)
    assert done.stopped_early
    assert done.steps < 40
    assert done.best_step < done.steps
    assert done.loss_best <= done.kl_before


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_state(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(made, loop={"eval_every": 8})
    with pytest.raises(KeyboardInterrupt):
        pocketllm.distill(made / "c", tmp_path / "o", settings, progress=stop_at(5))
    kept = tmp_path / "o.partial" / "checkpoint.safetensors"
    before = kept.read_bytes()
    monkeypatch.setattr(Loop, "_rate", lambda self, number: 1e30)  # from step 4 on
    with pytest.raises(TrainingError, match=r"step 5: the loss is .*last good state, after step 3, is kept"):
        pocketllm.distill(made / "c", tmp_path / "o", settings)
    assert kept.read_bytes() == before
    assert not (tmp_path / "o").exists()


def test_a_validation_that_is_not_finite_stops_it(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([1.0, float("nan")])
    monkeypatch.setattr(Distillation, "validate", lambda self: next(losses, float("inf")))
    with pytest.raises(TrainingError, match=r"step 4: the validation loss is nan; .*after step 3, is kept"):
        pocketllm.distill(made / "c", tmp_path / "o", config(made))
    shutil.rmtree(tmp_path / "o.partial")
    with pytest.raises(TrainingError, match="the validation loss is inf before the first step"):
        pocketllm.distill(made / "c", tmp_path / "o", config(made))


def test_bad_input(made: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="not a model compressed by pocketllm"):
        pocketllm.distill(made / "m", tmp_path / "o", config(made))
    with pytest.raises(ConfigError, match="less than one window of 2000"):
        pocketllm.distill(made / "c", tmp_path / "o", config(made, context=2000))
    with pytest.raises(ConfigError, match=r"context: got 5000, .*/c has 2048 positions"):
        pocketllm.distill(made / "c", tmp_path / "o", config(made, context=5000))
    with pytest.raises(
        ConfigError, match=r"the text \(.*/short.txt\) has 5 tokens, less than one window of 24"
    ):
        (tmp_path / "short.txt").write_text("short")
        pocketllm.distill(
            made / "c", tmp_path / "o", config(made, validation_text=str(tmp_path / "short.txt"))
        )
    with pytest.raises(ConfigError, match="has 1 window of 1000 tokens, wanted at least two"):
        pocketllm.distill(made / "c", tmp_path / "o", config(made, context=1000))
    with pytest.raises(SourceError, match="no such file"):
        pocketllm.distill(made / "c", tmp_path / "o", config(made, texts=("nowhere.txt",)))
    with pytest.raises(OutputError, match="is the model itself"):
        pocketllm.distill(made / "c", made / "c", config(made), overwrite=True)
    with pytest.raises(OutputError, match="already exists"):
        pocketllm.distill(made / "c", made / "c", config(made))
    with pytest.raises(ConfigError, match="nothing to train"):
        still = config(made, lr_codebook=0, lr_decoder=0, lr_scale=0, lr_norm=0, lr_dense=0)
        pocketllm.distill(made / "c", tmp_path / "o", still)
    with pytest.raises(SourceError, match="no such folder"):
        pocketllm.distill(made / "c", tmp_path / "o", config(made), teacher="./nowhere")
    with pytest.raises(
        ConfigError,
        match=r"teacher .*/c: is already compressed; name .* with --teacher .*made from .*/m",
    ):
        pocketllm.distill(made / "c", tmp_path / "o", config(made), teacher=str(made / "c"))
    assert not (tmp_path / "o").exists()
    pocketllm.distill(made / "c", tmp_path / "o", config(made, steps=1))  # what failed is not in the way


def test_a_teacher_with_another_vocabulary_is_refused(made: Path, tmp_path: Path) -> None:
    larger = tiny.save(tmp_path / "larger", vocab_size=128)
    with pytest.raises(ConfigError, match=r"larger has a vocabulary of 128 tokens, .* one of 96"):
        pocketllm.distill(made / "c", tmp_path / "o", config(made), teacher=str(larger))
    other = tiny.save(tmp_path / "other")
    path = other / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace('"a":', '"\u00e4":'), encoding="utf-8")
    with pytest.raises(ConfigError, match="the same number of tokens, but different ones"):
        pocketllm.distill(made / "c", tmp_path / "o", config(made), teacher=str(other))


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral"])
def test_a_teacher_on_the_disk_gives_the_same_bits(architecture: str, tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "m", architecture)
    found = []
    for scratch in (None, tmp_path / "scratch"):
        model = open_teacher(source, torch.float32, torch.device("cpu"), scratch=scratch)
        devices = {name: p.device.type for name, p in model.named_parameters()}
        assert {d for n, d in devices.items() if ".0." in n} == {"meta" if scratch else "cpu"}
        assert {d for n, d in devices.items() if ".0." not in n and ".1." not in n} == {"cpu"}
        target = LiveTeacher(model).target(torch.tensor([0]), torch.arange(20)[None] + 30)
        found.append(target(slice(2, 20)))
    assert isinstance(found[0], torch.Tensor) and torch.equal(found[0], found[1])


def test_distillation_from_a_teacher_on_the_disk(made: Path, tmp_path: Path) -> None:
    for name, on_disk in (("a", False), ("b", True)):
        pocketllm.distill(made / "c", tmp_path / name, config(made, steps=2), teacher_on_disk=on_disk)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_an_output_in_use_is_refused(made: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        pocketllm.distill(made / "c", tmp_path / "o", config(made), progress=stop_at(3))
    with locked(tmp_path / "o.partial"), pytest.raises(OutputError, match="in use by another process"):
        pocketllm.distill(made / "c", tmp_path / "o", config(made))


def test_settings_are_checked() -> None:
    for loop in ({"batch_size": 0}, {"warmup": 1.0}, {"dtype": "float16"}, {"patience": -1}):
        with pytest.raises(ConfigError):
            LoopConfig(**loop)
    for changes in ({"steps": 0}, {"context": 1}, {"validation_windows": 0}, {"lr_norm": -1}):
        with pytest.raises(ConfigError):
            dataclasses.replace(DistillConfig(), **changes)
