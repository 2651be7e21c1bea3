"""What a recovery refuses, before it costs time or anything is lost."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pocketllm
from pocketllm.errors import ConfigError, OutputError, ResumeError, SourceError
from pocketllm.recover.compress_then_distill import compress_and_distill
from pocketllm.recover.distill import dry_run_distill
from tests import tiny
from tests.commands import digest
from tests.recovery import config, make, stop_at


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("recover"))


def half_done(made: Path, output: Path, **options: object) -> Path:
    """A run stopped after its fifth step; its folder."""
    with pytest.raises(KeyboardInterrupt):
        pocketllm.distill(made / "c", output, config(made, **options), progress=stop_at(5))
    return output.with_name(output.name + ".partial")


def test_a_teacher_that_has_changed_is_another_run(made: Path, tmp_path: Path) -> None:
    teacher = tmp_path / "t"
    shutil.copytree(made / "m", teacher)
    with pytest.raises(KeyboardInterrupt):
        pocketllm.distill(made / "c", tmp_path / "o", config(made), teacher=str(teacher), progress=stop_at(5))
    weights = load_file(teacher / "model.safetensors")
    save_file({k: v * 1.01 for k, v in weights.items()}, teacher / "model.safetensors", {"format": "pt"})
    with pytest.raises(ResumeError, match="teacher_weights"):
        pocketllm.distill(made / "c", tmp_path / "o", config(made), teacher=str(teacher))


@pytest.mark.parametrize("place", ["c/inside", "m/inside"])
def test_nothing_is_written_into_what_is_read(place: str, tmp_path: Path) -> None:
    here = make(tmp_path / "own")
    before = digest(here / "c"), digest(here / "m")
    with pytest.raises(OutputError, match=r"inside .*must stay unchanged"):
        pocketllm.distill(here / "c", here / place, config(here))
    assert (digest(here / "c"), digest(here / "m")) == before


def test_a_record_is_not_replaced_unasked(made: Path, tmp_path: Path) -> None:
    log = tmp_path / "o.log"
    log.write_text("printed by the shell")
    with pytest.raises(OutputError, match=r"o.log: exists and is not the log"):
        pocketllm.distill(made / "c", tmp_path / "o", config(made))
    log.unlink()
    log.mkdir()
    (log / "summary.json").write_text("{}")
    with pytest.raises(OutputError, match="is not the log of a run"):
        dry_run_distill(made / "c", config(made), output=tmp_path / "o", overwrite=True)
    (log / "steps.jsonl").write_text("")
    with pytest.raises(OutputError, match="log of an earlier run"):
        pocketllm.distill(made / "c", tmp_path / "o", config(made))
    pocketllm.distill(made / "c", tmp_path / "o", config(made, steps=1), overwrite=True)
    assert json.loads((log / "summary.json").read_text())["steps"] == 1


def test_an_earlier_record_outlives_a_run_that_fails(made: Path, tmp_path: Path) -> None:
    pocketllm.distill(made / "c", tmp_path / "o", config(made, steps=1))
    before = digest(tmp_path / "o.log"), digest(tmp_path / "o")
    with pytest.raises(KeyboardInterrupt):
        pocketllm.distill(made / "c", tmp_path / "o", config(made), overwrite=True, progress=stop_at(1))
    assert (digest(tmp_path / "o.log"), digest(tmp_path / "o")) == before


def test_stopped_between_record_and_result_both_are_there_afterwards(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pocketllm.format.workspace import Workspace

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Workspace, "publish", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pocketllm.distill(made / "c", tmp_path / "o", config(made))
    pocketllm.distill(made / "c", tmp_path / "o", config(made))
    assert (tmp_path / "o" / "pocketllm.json").is_file()
    assert len((tmp_path / "o.log" / "steps.jsonl").read_text().splitlines()) == 8


@pytest.mark.parametrize("name", ["checkpoint.safetensors", "state.json", "teacher-ids.npy"])
def test_damaged_half_done_runs_say_which_file(name: str, made: Path, tmp_path: Path) -> None:
    folder = half_done(made, tmp_path / "o", teacher_top_k=4)
    complete = (folder / name).read_bytes()
    (folder / name).write_bytes(complete[: len(complete) // 3])
    with pytest.raises(ResumeError, match=rf"{name}: damaged .*delete .*o.partial to start again"):
        pocketllm.distill(made / "c", tmp_path / "o", config(made, teacher_top_k=4))


def test_lines_that_are_no_steps_are_left_out(made: Path, tmp_path: Path) -> None:
    folder = half_done(made, tmp_path / "o")
    with (folder / "log" / "steps.jsonl").open("a") as stream:
        stream.write('{"loss": 1.0}\n[1]\n{"st')
    pocketllm.distill(made / "c", tmp_path / "o", config(made))
    lines = (tmp_path / "o.log" / "steps.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, 9))


def test_numbers_are_looked_at(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"teacher_top_k: got 100000, the vocabulary has 96 tokens"):
        pocketllm.distill(made / "c", tmp_path / "o", config(made, teacher_top_k=100_000))
    for wrong in ({"lr_codebook": math.inf}, {"lr_scale": math.nan}):
        with pytest.raises(ConfigError, match="wanted at least 0"):
            config(made, **wrong)
    with pytest.raises(ConfigError, match="epochs: got inf"):
        pocketllm.LoraTuneConfig(epochs=math.inf)
    still = config(made, lr_codebook=0, lr_decoder=0, lr_scale=0, lr_norm=0, lr_dense=0)
    with pytest.raises(ConfigError, match="nothing to train"):
        dry_run_distill(made / "c", still)
    assert (
        dry_run_distill(made / "c", config(made, lr_scale=0))["trained_parameters"]
        .keys()
        .isdisjoint({"row scales"})
    )


def test_all_tokens_of_a_cached_teacher_give_the_whole_divergence(made: Path, tmp_path: Path) -> None:
    found = [
        pocketllm.distill(made / "c", tmp_path / f"o{k}", config(made, steps=1, teacher_top_k=k))
        for k in (0, 4, 96)
    ]
    assert found[2].kl_before == pytest.approx(found[0].kl_before, rel=1e-3)
    assert found[1].kl_before < found[0].kl_before
    assert [done.kl_tokens for done in found] == [0, 4, 96]
    summary = json.loads((tmp_path / "o4.log" / "summary.json").read_text())
    assert "4 likeliest tokens" in summary["loss_name"]


def test_a_report_whose_model_is_gone_says_so(tmp_path: Path) -> None:
    here = make(tmp_path / "own")
    (here / "m").rename(here / "moved")
    with pytest.raises(SourceError, match=r"the teacher of .*/c: .*name it with --teacher"):
        pocketllm.distill(here / "c", tmp_path / "o", config(here))


def test_a_chain_spares_what_is_not_its_own(made: Path, tmp_path: Path) -> None:
    kept = tmp_path / "o.plain"
    shutil.copytree(made / "c", kept)
    before = digest(kept)
    with pytest.raises(
        OutputError, match=r"o.plain: exists and was not created by an earlier run of this command"
    ):
        compress_and_distill(made / "m", tiny.settings(vector_len=3), config(made), tmp_path / "o")
    assert digest(kept) == before


def test_a_chain_looks_at_its_text_first(made: Path, tmp_path: Path) -> None:
    for wrong, error, said in (
        ({"texts": ("nowhere.txt",)}, SourceError, "no such file"),
        ({"context": 2000}, ConfigError, "less than one window of 2000"),
        ({"context": 5000}, ConfigError, "context: got 5000, .* has 2048 positions"),
    ):
        with pytest.raises(error, match=said):
            compress_and_distill(made / "m", tiny.settings(), config(made, **wrong), tmp_path / "o")
        assert not list(tmp_path.glob("o*"))


def test_the_teachers_files_hold_float32(made: Path, tmp_path: Path) -> None:
    import numpy as np

    folder = half_done(made, tmp_path / "o", teacher_top_k=4)
    assert np.load(folder / "teacher-log-p.npy").dtype == np.float32
    assert torch.from_numpy(np.load(folder / "teacher-log-p.npy")).exp().sum(dim=-1).max() <= 1.0001


def test_labels_teach_the_text_at_the_cost_of_the_divergence(made: Path, tmp_path: Path) -> None:
    """With labels the likelihood of the text rises more; divergences are reported as such, not as the loss."""
    from pocketllm.evaluate.perplexity import perplexity

    text, found = (made / "t.txt").read_text(), []
    for weight in (0.0, 0.9):
        options = config(made, steps=30, label_weight=weight, lr_dense=1e-2)
        done = pocketllm.distill(made / "c", tmp_path / f"o{weight}", options)
        model, tokenizer = pocketllm.load(tmp_path / f"o{weight}", dtype=torch.float32)
        found.append((done, perplexity(model, tokenizer, text, 24).perplexity))
    (plain, before), (taught, after) = found
    assert after < 0.97 * before
    assert taught.kl_before == pytest.approx(plain.kl_before) and taught.kl_stored > plain.kl_stored
    assert taught.loss_best > taught.kl_stored
    with pytest.raises(ConfigError, match=r"label_weight: got 1\.5, wanted 0 to 1"):
        config(made, label_weight=1.5)
