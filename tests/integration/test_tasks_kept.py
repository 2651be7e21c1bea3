"""Results of lm-eval tasks: kept, taken again, resumed, named; what they need."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import lm_eval.tasks
import pytest
import torch

import pocketllm
from pocketllm.errors import ConfigError, ExtraError, SourceError, WeightError
from pocketllm.evaluate import harness, results, tasks
from pocketllm.evaluate.local_tasks import local_task_digest
from pocketllm.evaluate.paired_accuracy import average, compare
from tests import tiny
from tests.task_data import CONFIG, certain_model, rows, subject, write_rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data"))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POCKETLLM_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def model() -> Any:
    return certain_model()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense model, and two compressed ones of it."""
    folder = tmp_path_factory.mktemp("models")
    made = {"dense": tiny.save(folder / "dense")}
    for seed in (0, 1):
        made[f"small{seed}"] = folder / f"small{seed}"
        pocketllm.compress(made["dense"], tiny.settings(seed=seed), made[f"small{seed}"])
    return made


def no_model() -> tuple[Any, Any]:
    raise AssertionError("loaded though everything is kept")


def test_results_are_kept(model: Any, data: Path) -> None:
    names = ["piqa", "boolq"]
    first = tasks.evaluate_tasks(names, subject(model), CONFIG, data, hub=False)
    seen: list[tuple[str, float]] = []
    again = tasks.evaluate_tasks(
        names,
        tasks.Subject("a", "float32", no_model),
        CONFIG,
        data,
        hub=False,
        progress=lambda task, share: seen.append((task, share)),
    )
    assert all(result.cached for result in again.values()) and seen == [("piqa", 1.0), ("boolq", 1.0)]
    assert {n: dataclasses.replace(r, cached=False) for n, r in again.items()} == first
    assert "scores" not in again["piqa"].to_dict()


@pytest.mark.parametrize("change", ["model", "dtype", "limit", "data", "no cache"])
def test_other_settings_are_measured_anew(change: str, model: Any, data: Path, tmp_path: Path) -> None:
    tasks.evaluate_tasks(["piqa"], subject(model), CONFIG, data, hub=False)
    who, config, folder = subject(model), CONFIG, data
    if change == "model":
        who = subject(model, "b")
    elif change == "dtype":
        who = dataclasses.replace(who, setting="bfloat16")
    elif change == "limit":
        config = dataclasses.replace(CONFIG, limit=5)
    elif change == "data":
        folder = tmp_path / "other"
        (folder / "piqa").mkdir(parents=True)
        (folder / "piqa" / "valid.jsonl").write_text("\n".join(map(json.dumps, rows("piqa", 7))))
    [found] = tasks.evaluate_tasks(
        ["piqa"], who, config, folder, hub=False, cache=change != "no cache"
    ).values()
    assert not found.cached
    assert found.n == {"limit": 5, "data": 7}.get(change, 12)


def test_an_interrupted_evaluation_resumes(model: Any, data: Path) -> None:
    def stop(task: str, share: float) -> None:
        if task == "boolq":
            raise KeyboardInterrupt

    names = ["piqa", "boolq"]
    with pytest.raises(KeyboardInterrupt):
        tasks.evaluate_tasks(names, subject(model), CONFIG, data, hub=False, progress=stop)
    found = tasks.evaluate_tasks(names, subject(model), CONFIG, data, hub=False)
    assert found["piqa"].cached and not found["boolq"].cached
    [kept] = [
        file
        for file in (Path(results.cache_folder()) / "eval" / "results").iterdir()
        if "piqa" in file.read_text()
    ]
    kept.write_text(kept.read_text()[:40])  # damaged: measured again
    assert not tasks.evaluate_tasks(["piqa"], subject(model), CONFIG, data, hub=False)["piqa"].cached


def test_a_model_without_finite_logits_is_not_scored(data: Path) -> None:
    damaged = tiny.model()
    damaged.config.name_or_path = "damaged"
    with torch.no_grad():
        damaged.model.norm.weight[3] = torch.nan
    for _ in range(2):  # the second time there is nothing kept of the first
        with pytest.raises(WeightError, match="damaged: its logits are not finite"):
            tasks.evaluate_tasks(["boolq"], subject(damaged), CONFIG, data, hub=False)


def test_tokens_that_the_model_does_not_have(data: Path) -> None:
    smaller = tiny.model(vocab_size=64)
    smaller.config.name_or_path = "smaller"
    with pytest.raises(SourceError, match=r"smaller: the tokenizer produces token .* embedding has 64 rows"):
        tasks.evaluate_tasks(["piqa"], subject(smaller), CONFIG, data, hub=False)
    lm = harness.PocketLM(tiny.model(), tiny.tokenizer(), 64, 48)
    with pytest.raises(SourceError, match="produces token 96"):  # as an answer alone, too
        lm._loglikelihood_tokens([(("", ""), [5], [96])])
    with pytest.raises(SourceError, match="produces token 97"):
        lm._model_generate(torch.tensor([[5, 97]]), max_length=4, stop=["a"])
    assert lm._model_generate(torch.tensor([[5, 95]]), max_length=4, stop=["a"]).shape == (1, 4)


def test_a_kept_result_without_a_field_is_measured_again(model: Any, data: Path) -> None:
    tasks.evaluate_tasks(["piqa"], subject(model), CONFIG, data, hub=False)
    [kept] = (Path(results.cache_folder()) / "eval" / "results").iterdir()
    values = json.loads(kept.read_text())
    for result in ({n: v for n, v in values["result"].items() if n != "acc"}, {**values["result"], "new": 1}):
        kept.write_text(json.dumps({**values, "result": result}))
        for cached in (False, True):
            found = tasks.evaluate_tasks(["piqa"], subject(model), CONFIG, data, hub=False)
            assert found["piqa"].cached == cached


def test_compressed_models_in_both_modes(data: Path, folders: dict[str, Path]) -> None:
    found = []
    for mode in ("dense", "packed"):
        loaded, _ = pocketllm.load(folders["small0"], mode=mode, dtype=torch.float32)
        got = tasks.evaluate_tasks(["piqa"], subject(loaded, mode), CONFIG, data, hub=False)
        found.append(got["piqa"])
    assert found[0].scores["acc"] == found[1].scores["acc"]
    probabilities = [torch.tensor(each.scores["choice_probability"]) for each in found]
    torch.testing.assert_close(*probabilities, rtol=1e-4, atol=1e-6)
    for field in ("acc", "acc_norm"):
        assert getattr(found[0], field) == getattr(found[1], field)


def test_fingerprints(folders: dict[str, Path], tmp_path: Path) -> None:
    found = {name: results.folder_digest(folder) for name, folder in folders.items()}
    assert len(set(found.values())) == 3
    copy = shutil.copytree(folders["dense"], tmp_path / "copy")
    assert results.folder_digest(copy) == found["dense"]
    weights = copy / "model.safetensors"
    body = bytearray(weights.read_bytes())
    body[len(body) // 2] ^= 1
    weights.write_bytes(body)
    assert results.folder_digest(copy) != found["dense"]


def test_names(data: Path) -> None:
    assert tasks.task_names(["paper", "piqa", "lambada"], None) == [*tasks.PAPER_TASKS, "lambada_openai"]
    assert tasks.task_names(["local"], data) == ["arc_easy", "boolq", "lambada_openai", "piqa", "winogrande"]
    with pytest.raises(
        ConfigError, match=r"neither --data nor POCKETLLM_DATA .*looked for .*piqa/valid.json"
    ):
        tasks.task_names(["local"], None)


def test_the_digest_of_a_task_is_that_of_its_files(tmp_path: Path) -> None:
    rows, labels = tmp_path / "piqa" / "valid.jsonl", tmp_path / "piqa" / "valid-labels.lst"
    with pytest.raises(SourceError, match=r"piqa: no file for this task in "):
        local_task_digest("piqa", tmp_path)
    rows.parent.mkdir()
    rows.write_text("{}")
    labels.write_text("0")
    found = [local_task_digest("piqa", tmp_path)]
    for path, text in ((rows, "{} "), (labels, "1")):
        path.write_text(text)
        found.append(local_task_digest("piqa", tmp_path))
    assert len(set(found)) == 3


def test_missing_data(data: Path) -> None:
    who = tasks.Subject("a", "", no_model)
    with pytest.raises(
        SourceError, match=r"openbookqa: .* contains no openbookqa/test.jsonl or .*format: one JSON"
    ):
        tasks.evaluate_tasks(["piqa", "openbookqa"], who, CONFIG, data, hub=False)
    with pytest.raises(
        SourceError, match=r"hellaswag: the Hub lookup failed, .*no data folder is given \(--data\)"
    ):
        tasks.evaluate_tasks(["hellaswag"], who, CONFIG)


def test_lm_evals_other_tasks(
    model: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By name, from lm-eval's registry; here one of two tasks under a tag."""
    registry = tmp_path / "registry"
    registry.mkdir()
    for name in ("first", "second"):
        [source] = tasks._sources("boolq", data, hub=False)
        include = source.load().config.metadata["config_source"]
        (registry / f"{name}.yaml").write_text(f"include: {include}\ntask: {name}\ntag: both\n")

    class Manager(lm_eval.tasks.TaskManager):  # type: ignore[misc]
        def __init__(self, include_defaults: bool) -> None:
            super().__init__(include_path=str(registry), include_defaults=False)

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Manager)
    found = tasks.evaluate_tasks(["both"], subject(model), CONFIG)
    assert sorted(found) == ["first", "second"]
    assert found["first"].acc == found["second"].acc and found["first"].data == "hub: json"
    sources = tasks.find_tasks(["both"], None)  # loaded once, for several models
    for who in (subject(tiny.model(), "b"), subject(model)):
        again = tasks.run_tasks(sources, who, CONFIG, cache=False)
    assert again["second"].scores == found["second"].scores and again["second"].n == found["second"].n
    with pytest.raises(ConfigError, match=r"unknown task 'frist'; similar: first.*from local files: arc_ch"):
        tasks.evaluate_tasks(["frist"], subject(model), CONFIG)


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ExtraError, match=r"pip install 'pocketllm-codec\[eval\]'"):
        tasks.evaluate_tasks(["piqa"], tasks.Subject("a", "", no_model), CONFIG)


def result(task: str, scores: list[float], chance: float | None = 0.5) -> tasks.TaskResult:
    """A result with these scores and their exact mean and standard error."""
    values = torch.tensor(scores, dtype=torch.float64)
    acc, error = float(values.mean()), float(values.std() / len(scores) ** 0.5)
    return tasks.TaskResult(
        task, acc, error, None, None, len(scores), None, chance, "", "", 0.0, {}, 0, {}, {"acc": scores}
    )


def test_averages_and_differences() -> None:
    own = {"piqa": result("piqa", [1, 1, 0, 0]), "boolq": result("boolq", [1, 0, 0, 0])}
    dense = {"piqa": result("piqa", [1, 1, 1, 0]), "boolq": result("boolq", [1, 1, 1, 1])}
    means = average(own)
    assert means["paper"]["tasks"] == ["piqa"] and len(means["paper"]["missing"]) == 4
    assert means["all"]["acc"] == 0.375 and means["all"]["chance"] == 0.5 and means["all"]["open"] == []
    open_ended = average({**own, "lambada_openai": result("lambada_openai", [1, 0], None)})["all"]
    assert open_ended["chance"] == pytest.approx(1 / 3) and open_ended["open"] == ["lambada_openai"]
    errors = [own["piqa"].acc_stderr or 0, own["boolq"].acc_stderr or 0]
    assert means["all"]["stderr"] == pytest.approx((errors[0] ** 2 + errors[1] ** 2) ** 0.5 / 2)
    found = compare(own, dense)
    piqa = found["tasks"]["piqa"]["acc"]
    assert piqa["difference"] == -0.25 and piqa["margin_kept"] == 0
    assert piqa["stderr"] == pytest.approx(0.25)  # of 0, 0, -1, 0
    assert piqa["combined_stderr"] == pytest.approx(
        ((own["piqa"].acc_stderr or 0) ** 2 + (dense["piqa"].acc_stderr or 0) ** 2) ** 0.5
    )
    assert found["average"]["all"]["difference"] == -0.5
    assert found["average"]["all"]["stderr"] == pytest.approx(0.25 * 2**0.5 / 2)
    assert found["average"]["paper"]["difference"] == -0.25
    empty = average({})
    assert empty == {"paper": None, "all": None}
    assert compare({}, dense) == {"tasks": {}, "average": {"paper": None, "all": None}}
