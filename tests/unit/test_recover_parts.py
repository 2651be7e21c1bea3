"""Parts of recovery: items, the order of steps, the record of a run, rewriting a folder."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import PartialState

from pocketllm.config import DistillConfig, LoopConfig
from pocketllm.errors import ConfigError, ExtraError, ShapeError
from pocketllm.format.rewrite import rewrite
from pocketllm.format.workspace import Workspace
from pocketllm.recover.adapter import need_peft
from pocketllm.recover.base_model import compute_dtype
from pocketllm.recover.distill_task import training_windows
from pocketllm.recover.loop import Group, Loop
from pocketllm.recover.lora_task import read_items
from pocketllm.recover.run_log import RunLog
from pocketllm.source.model_class import find_blocks
from tests import tiny


def test_peft_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ExtraError, match=r"pip install 'pocketllm-codec\[finetune\]'"):
        need_peft()


def test_blocks_are_the_longest_list_that_lies_in_no_other() -> None:
    def experts() -> torch.nn.Module:
        return torch.nn.ModuleDict({"experts": torch.nn.ModuleList(torch.nn.Identity() for _ in range(5))})

    layers = torch.nn.ModuleList(experts() for _ in range(3))
    model = torch.nn.ModuleDict({"layers": layers, "few": torch.nn.ModuleList([torch.nn.Identity()])})
    assert find_blocks(model) == ("layers", layers)
    assert find_blocks(torch.nn.Identity()) is None


def test_items_learn_the_answer_and_its_end(tmp_path: Path) -> None:
    tokenizer = tiny.tokenizer()
    rows = [{"prompt": "abc", "response": "de"}, {"prompt": "x" * 50, "response": "cut off"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    (tmp_path / "b.txt").write_text("y" * 45)
    items = read_items(tokenizer, (str(tmp_path),), 20)
    assert [(len(i.ids), i.weight) for i in items] == [(6, 3), (20, 19), (20, 19)]
    assert all(
        i.learned.nonzero()[:, 0].tolist() == list(range(len(i.ids) - i.weight, len(i.ids))) for i in items
    )
    assert items[0].ids[-1] == tokenizer.eos_token_id
    (tmp_path / "b.txt").unlink()
    with pytest.raises(ConfigError, match=r"contains 1 items .*; 1 of 2 instructions leave no room"):
        read_items(tokenizer, (str(tmp_path),), 20)


def test_instructions_that_do_not_fit_are_not_left_out_in_silence(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    long, short = {"prompt": "x" * 30, "response": "y"}, {"prompt": "x", "response": "y"}
    path = tmp_path / "a.json"
    path.write_text(json.dumps([long, short] * 3))
    assert len(read_items(tiny.tokenizer(), (str(path),), 40)) == 6 and not caplog.messages
    assert len(read_items(tiny.tokenizer(), (str(path),), 30)) == 3
    wanted = "3 of 6 instructions leave no room for their answer in a context of 30 tokens; raise --context"
    assert caplog.messages == [f"{wanted}, or they are skipped"]
    path.write_text(json.dumps([long] * 2))
    with pytest.raises(ConfigError, match=r"contains 0 items .*; 2 of 2 instructions leave no room"):
        read_items(tiny.tokenizer(), (str(path),), 30)


def test_validating_on_training_text_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("abcdef" * 10)
    monkeypatch.chdir(tmp_path)

    def warnings(texts: str, validation: str) -> list[str]:
        caplog.clear()
        training_windows(
            tiny.tokenizer(), DistillConfig(texts=(texts,), validation_text=validation, context=3)
        )
        return caplog.messages

    assert warnings("a.txt", "b.txt") == []
    assert warnings("a.txt", "./a.txt") == warnings(str(tmp_path), "a.txt") != []
    assert warnings("a.txt", str(tmp_path))[0].endswith(
        "is used for both training and validation; name another --validation-text"
    )


class Square:
    """Least squares towards the mean of five numbers."""

    items = 5

    def __init__(self) -> None:
        self.value = torch.nn.Parameter(torch.zeros(1))
        self.seen: list[list[int]] = []

    def groups(self) -> list[Group]:
        return [Group("value", 0.1, [self.value]), Group("frozen", 0.0, [torch.nn.Parameter(torch.zeros(1))])]

    def weight(self, numbers: torch.Tensor) -> float:
        return float(len(numbers))

    def backward(self, numbers: torch.Tensor, scale: float) -> float:
        self.seen.append(numbers.tolist())
        loss = scale * (self.value - numbers.float()).square().sum()
        loss.backward()
        return float(loss.detach())

    def validate(self) -> float:
        return float((self.value.detach() - 2).square())


def loop_of(task: Any, tmp_path: Path, **settings: Any) -> Loop:
    work = Workspace.at(tmp_path / "o", {"a": 1})
    config = LoopConfig(**{"batch_size": 2, "eval_every": 5, **settings})
    return Loop(task, config, 20, work, RunLog(tmp_path / "o.log"), PartialState(cpu=True))


def test_every_epoch_sees_every_item_once(tmp_path: Path) -> None:
    task = Square()
    steps: list[int] = []
    at = loop_of(task, tmp_path).run(lambda t: steps.append(t.step))
    flat = [number for batch in task.seen for number in batch]
    assert all(sorted(flat[n : n + 5]) == [0, 1, 2, 3, 4] for n in range(0, 40, 5))
    assert steps == list(range(1, 21))
    assert [step for step, _ in at.history] == [0, 5, 10, 15, 20]
    assert at.best_loss == min(loss for _, loss in at.history)
    assert float((task.value.detach() - 2).square()) == pytest.approx(at.best_loss)


def test_gradients_are_scaled_down_to_a_norm(tmp_path: Path) -> None:
    task = Square()
    loop = loop_of(task, tmp_path, max_grad_norm=1e-3)
    loop.log.resume_at(0)
    loop._validate()
    loop._step()
    assert task.value.grad is not None
    assert float(task.value.grad.abs()) == pytest.approx(1e-3, rel=1e-4)


def test_the_schedule_runs_once_in_each_cycle(tmp_path: Path) -> None:
    def rates(**settings: Any) -> list[float]:
        loop = loop_of(Square(), tmp_path, **settings)
        return [round(loop._rate(number), 3) for number in range(20)]

    assert rates(schedule="constant", warmup=0.1) == [0.5] + [1.0] * 19
    assert rates(schedule="linear", warmup=0) == [round(1 - n / 20, 3) for n in range(20)]
    assert rates(cycles=4, warmup=0) == [1.0, 0.905, 0.655, 0.345, 0.095] * 4
    assert rates(cycles=3, schedule="linear", warmup=0)[5:8] == [0.286, 1.0, 0.857]  # begins at 0, 6, 13


def test_a_cycle_starts_from_the_best_parameters(tmp_path: Path) -> None:
    class Watched(Square):
        def __init__(self) -> None:
            super().__init__()
            self.value.data += 2  # the mean: no step is an improvement
            self.values: list[float] = []  # before each step

        def backward(self, numbers: torch.Tensor, scale: float) -> float:
            self.values.append(self.validate())
            return super().backward(numbers, scale)

    task = Watched()
    loop = loop_of(task, tmp_path, cycles=2, eval_every=1, schedule="constant", warmup=0)
    losses = [loss for _, loss in loop.run(lambda done: None).history]
    assert task.values[:10] == losses[:10] and task.values[11:] == losses[11:20]
    assert task.values[10] == min(losses[:11]) < losses[10]
    assert loop.optimizer.state[task.value]["step"] == 10  # its moments began anew


def test_log_drops_what_is_run_again(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "o.log")
    log.resume_at(0)
    for step in range(1, 6):
        log.add({"step": step, "loss": 1.0})
    with (log.folder / "steps.jsonl").open("a") as stream:
        stream.write('{"step": 6, "lo')  # a kill in the middle of a line
    log.resume_at(3)
    assert [line["step"] for line in log.steps()] == [1, 2, 3]
    silent = RunLog(tmp_path / "p.log", enabled=False)
    silent.resume_at(0)
    silent.add({"step": 1})
    silent.finish({}, [])
    assert not silent.folder.exists()


def test_the_picture_is_left_out_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    log = RunLog(tmp_path / "o.log")
    log.resume_at(0)
    log.finish({"title": "x"}, [(0, 1.0)])
    assert not (log.folder / "curve.png").exists()
    assert (log.folder / "summary.json").is_file()


def test_rewriting_checks_dtype_and_shape(tmp_path: Path) -> None:
    import pocketllm

    source = tiny.save(tmp_path / "m")
    pocketllm.compress(source, tiny.settings(), tmp_path / "c")
    name = "model.norm.weight"
    for value in (torch.zeros(36, dtype=torch.float16), torch.zeros(35), torch.zeros(36, 1)):
        with pytest.raises(ShapeError, match=name):
            rewrite(tmp_path / "c", {name: value}, tmp_path / "o", {})
    with pytest.raises(ShapeError, match="no such tensor"):
        rewrite(tmp_path / "c", {"nothing": torch.zeros(1)}, tmp_path / "o", {})
    report = rewrite(tmp_path / "c", {}, tmp_path / "o", {"method": "none"})
    assert report["recover"] == {"method": "none"}
    assert (tmp_path / "o" / "model.safetensors").read_bytes() == (
        tmp_path / "c" / "model.safetensors"
    ).read_bytes()
    pocketllm.load(tmp_path / "o")


def test_dtype_follows_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch, "cpu", SimpleNamespace(_is_avx512_bf16_supported=lambda: True))
    assert compute_dtype("auto", cpu) == torch.bfloat16
    monkeypatch.setattr(torch, "cpu", SimpleNamespace())
    assert compute_dtype("auto", cpu) == torch.float32
    assert compute_dtype("bfloat16", cpu) == torch.bfloat16
