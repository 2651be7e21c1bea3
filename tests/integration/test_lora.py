"""LoRA on tiny compressed models: training, PEFT's form, merging, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pocketllm
from pocketllm import LoraTuneConfig
from pocketllm.errors import ConfigError, FormatError, LoadError, OutputError, SourceError, TrainingError
from pocketllm.format.checkpoint import folder_bytes, read_report
from pocketllm.format.report import counting_adapter
from pocketllm.format.workspace import locked
from pocketllm.recover.adapter import attach_adapter, check_adapter, merged
from pocketllm.recover.base_model import open_base
from pocketllm.recover.lora import dry_run_lora
from pocketllm.report import Comparison, Evaluation, compare, draw
from tests import tiny
from tests.commands import digest
from tests.recovery import quick_loop

peft = pytest.importorskip("peft")

IDS = torch.arange(20)[None] + 30


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense model `m`, its compressed form `c`, instructions, and an adapter `a`."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("lora")
    source = tiny.save(folder / "m")
    pocketllm.compress(source, tiny.calibrated(tiny.settings()), folder / "c")
    words = ["fox", "dog", "cat", "cow"] * 8
    rows = [
        {"instruction": f"say {w}", "input": "now" if n % 2 else "", "output": f"{w} {w}"}
        for n, w in enumerate(words)
    ]
    (folder / "alpaca.json").write_text(json.dumps(rows))
    pocketllm.lora(folder / "c", folder / "a", config(folder))
    return folder


def config(made: Path, **changes: Any) -> LoraTuneConfig:
    """A quick run."""
    loop = quick_loop(**{"eval_every": 3, "checkpoint_every": 2, **changes.pop("loop", {})})
    values = {"steps": 6, "context": 200, "texts": (str(made / "alpaca.json"),), "rank": 4, "alpha": 8}
    return LoraTuneConfig(**{**values, "learning_rate": 1e-2, "loop": loop, **changes})


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=IDS).logits.float()


def test_it_lowers_the_loss_and_counts_its_bytes(made: Path, tmp_path: Path) -> None:
    before = digest(made / "c")
    done = pocketllm.lora(made / "c", tmp_path / "a", config(made))
    assert done.loss_stored < 0.98 * done.loss_before
    assert done.loss_stored == pytest.approx(done.loss_best, rel=0.01)
    assert done.adapter_bytes == folder_bytes(tmp_path / "a")
    assert done.bytes_on_disk == folder_bytes(made / "c") + folder_bytes(tmp_path / "a")
    assert digest(made / "c") == before
    assert (tmp_path / "a.log" / "curve.png").is_file()
    assert digest(tmp_path / "a") == digest(made / "a") | {
        "pocketllm-adapter.json": digest(tmp_path / "a")["pocketllm-adapter.json"]
    }


@pytest.mark.parametrize("mode", ["dense", "packed"])
def test_a_dry_run_tells_what_will_lie_on_disk(mode: str, made: Path, tmp_path: Path) -> None:
    planned = dry_run_lora(made / "c", config(made, mode=mode))
    done = pocketllm.lora(made / "c", tmp_path / "a", config(made, mode=mode))
    assert abs(planned["adapter_bytes"] - done.adapter_bytes) <= 12  # digits of two losses
    assert planned["bytes_on_disk"] == planned["base_bytes"] + planned["adapter_bytes"]
    for key in ("base_bytes", "trained_parameters", "training_items", "validation_items", "steps"):
        assert planned[key] == vars(done)[key]


def test_peft_loads_the_adapter_on_both_modes(made: Path) -> None:
    plain, _ = pocketllm.load(made / "c", mode="dense", dtype=torch.float32)
    base = logits(plain)
    found = []
    for mode in ("dense", "packed"):
        model, _ = pocketllm.load(made / "c", mode=mode, dtype=torch.float32)
        found.append(logits(peft.PeftModel.from_pretrained(model, str(made / "a"))))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    assert (found[0] - base).abs().max() > 0.01 * base.std()


def test_merging_keeps_the_logits_where_pefts_own_drops_the_adapter(made: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    base = open_base(made / "c", None)
    adapted = logits(attach_adapter(base.load("packed", "cpu"), made / "c", made / "a"))
    pocketllm.merge(made / "c", made / "a", tmp_path / "dense", dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    torch.testing.assert_close(logits(dense), adapted, rtol=1e-3, atol=1e-4)
    model, _ = pocketllm.load(made / "c", mode="packed", dtype=torch.float32)
    with pytest.warns(UserWarning, match="no longer tied"):
        dropped = peft.PeftModel.from_pretrained(model, str(made / "a")).merge_and_unload()
    plain, _ = pocketllm.load(made / "c", mode="dense", dtype=torch.float32)
    torch.testing.assert_close(logits(dropped), logits(plain), rtol=1e-4, atol=1e-5)


def test_weights_are_as_open_as_the_files_beside_them(made: Path, tmp_path: Path) -> None:
    pocketllm.merge(made / "c", made / "a", tmp_path / "dense")
    for folder in (made / "a", tmp_path / "dense"):
        assert len({path.stat().st_mode for path in folder.iterdir()}) == 1


def test_a_merge_that_changes_logits_is_not_written(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = open_base(made / "c", None)
    monkeypatch.setattr(peft.PeftModel, "merge_and_unload", lambda self: self.unload(), raising=False)
    with pytest.raises(LoadError, match="merging changed the logits"):
        merged(base, made / "a")


def test_reencoding_says_what_it_costs(made: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("the quick brown fox jumps over the lazy dog. " * 10)
    done = pocketllm.merge(
        made / "c", made / "a", tmp_path / "o", reencode=True, text=tmp_path / "t.txt", context=24, windows=4
    )
    assert set(done.perplexities) == {"base", "with adapter", "re-encoded"}
    assert len(set(done.perplexities.values())) == 3
    assert done.bytes_on_disk == folder_bytes(tmp_path / "o")
    assert done.bytes_before == folder_bytes(made / "c") + folder_bytes(made / "a")
    pocketllm.load(tmp_path / "o")
    assert (tmp_path / "o-dense" / "config.json").is_file()


def test_an_interrupted_merge_resumes(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(event: Any) -> None:
        if event.stage == "encode" and event.share > 0.4:
            raise KeyboardInterrupt

    def again(*arguments: Any) -> None:
        raise AssertionError("merged again")

    with pytest.raises(KeyboardInterrupt):
        pocketllm.merge(made / "c", made / "a", tmp_path / "o", reencode=True, progress=stop)
    assert not (tmp_path / "o").exists()
    with monkeypatch.context() as patch:
        patch.setattr("pocketllm.recover.merge.merged", again)
        done = pocketllm.merge(made / "c", made / "a", tmp_path / "o", reencode=True, windows=2)
    assert "Python" in done.text  # measured though no text was named
    assert set(done.perplexities) == {"base", "with adapter", "re-encoded"}
    with pytest.raises(OutputError, match="exists"):  # of another dtype: not the same merge
        pocketllm.merge(made / "c", made / "a", tmp_path / "o", dtype=torch.float32)


@pytest.mark.parametrize("reencode", [False, True])
@pytest.mark.parametrize(
    ("words", "changes", "error"),
    [
        (None, {}, r"t\.txt: no such file"),
        ("ab", {}, "the text has 2 tokens, which is 0 windows of 512"),
        ("a" * 6000, {"context": 3000}, r"context: got 3000, .* 2048 positions"),
    ],
)
def test_a_merge_looks_at_its_text_first(
    reencode: bool, words: str | None, changes: dict[str, Any], error: str, made: Path, tmp_path: Path
) -> None:
    if words is not None:
        (tmp_path / "t.txt").write_text(words)
    with pytest.raises((ConfigError, SourceError), match=error):
        pocketllm.merge(
            made / "c", made / "a", tmp_path / "o", reencode=reencode, text=tmp_path / "t.txt", **changes
        )
    assert not list(tmp_path.glob("o*"))


def test_a_damaged_record_of_a_merge_is_named(made: Path, tmp_path: Path) -> None:
    (tmp_path / "o-dense").mkdir()
    for content in (b"{", b"\xff"):
        (tmp_path / "o-dense" / "pocketllm-merged.json").write_bytes(content)
        with pytest.raises(FormatError, match=r"merged\.json: damaged \(.*\); delete .*/o-dense to merge"):
            pocketllm.merge(made / "c", made / "a", tmp_path / "o", reencode=True)


@pytest.mark.parametrize("changes", [{"mode": "packed"}, {"dropout": 0.1}, {"targets": ("q_proj", "v_proj")}])
def test_other_settings_train_too(changes: dict[str, Any], made: Path, tmp_path: Path) -> None:
    loop = {"micro_batch": 2, "gradient_checkpointing": True}
    done = pocketllm.lora(made / "c", tmp_path / "a", config(made, **changes, loop=loop))
    assert done.loss_stored < done.loss_before


def test_plain_text_and_conv1d(made: Path, tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "m", "gpt2")
    pocketllm.compress(source, tiny.calibrated(tiny.settings()), tmp_path / "c")
    (tmp_path / "t.txt").write_text("the quick brown fox jumps over the lazy dog. " * 20)
    settings = config(made, texts=(str(tmp_path / "t.txt"),), context=24)
    done = pocketllm.lora(tmp_path / "c", tmp_path / "a", settings)
    assert done.loss_stored < done.loss_before
    pocketllm.merge(tmp_path / "c", tmp_path / "a", tmp_path / "dense")


@pytest.mark.parametrize("mode", ["dense", "packed"])
def test_an_adapter_on_the_head_is_trained(mode: str, made: Path, tmp_path: Path) -> None:
    """Though it computes nothing at first, and the loss is taken at the head."""
    from safetensors.torch import load_file

    pocketllm.compress(tiny.save(tmp_path / "m", "qwen3"), tiny.settings(), tmp_path / "c")
    pocketllm.lora(tmp_path / "c", tmp_path / "a", config(made, targets=("lm_head", "q_proj"), mode=mode))
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    trained = {name for name, value in tensors.items() if ".lora_B." in name and value.any()}
    assert len(trained) == 3 and any("lm_head" in name for name in trained)


def test_an_interrupted_run_resumes_to_the_same_bytes(made: Path, tmp_path: Path) -> None:
    def stop(event: Any) -> None:
        if "step 3 " in event.detail:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pocketllm.lora(made / "c", tmp_path / "a", config(made), progress=stop)
    assert not (tmp_path / "a").exists()
    pocketllm.lora(made / "c", tmp_path / "a", config(made))
    assert digest(tmp_path / "a") == digest(made / "a")


def test_what_is_refused(made: Path, tmp_path: Path) -> None:
    other = tiny.save(tmp_path / "m", num_hidden_layers=1)
    pocketllm.compress(other, tiny.settings(), tmp_path / "other")
    with pytest.raises(ConfigError, match=r"was trained on .*/c \(made from .*/m\), not on .*/other"):
        pocketllm.merge(tmp_path / "other", made / "a", tmp_path / "o")
    with pytest.raises(FormatError, match="no adapter_config"):
        pocketllm.merge(made / "c", made / "m", tmp_path / "o")
    with pytest.raises(FormatError, match="not a model compressed"):
        pocketllm.lora(made / "m", tmp_path / "o", config(made))
    with pytest.raises(OutputError, match="an adapter already exists"):
        pocketllm.lora(made / "c", made / "a", config(made))
    with pytest.raises(OutputError, match="is not an adapter"):
        pocketllm.lora(made / "c", made / "m", config(made))
    with pytest.raises(OutputError, match="exists"):
        pocketllm.merge(made / "c", made / "a", made / "m")
    with pytest.raises(ConfigError, match="targets nothing"):
        pocketllm.lora(made / "c", tmp_path / "o", config(made, targets=("nothing",)))
    with pytest.raises(ConfigError, match=r"context: got 5000, .*/c has 2048 positions"):
        pocketllm.lora(made / "c", tmp_path / "o", config(made, context=5000))
    for changes in ({"rank": 0}, {"epochs": 0}, {"dropout": 1.0}, {"mode": "disk"}, {"steps": 0}):
        with pytest.raises(ConfigError):
            LoraTuneConfig(**changes)


def test_an_adapter_that_does_not_fit_is_named(made: Path, tmp_path: Path) -> None:
    other = tiny.save(tmp_path / "m", intermediate_size=60)
    pocketllm.compress(other, tiny.settings(), tmp_path / "other")
    shutil.copytree(made / "a", tmp_path / "a")
    (tmp_path / "a" / "pocketllm-adapter.json").write_text("{}")
    with pytest.raises(FormatError, match=r"pocketllm-adapter\.json: damaged \(no base in it\)"):
        check_adapter(tmp_path / "a", tmp_path / "other")
    (tmp_path / "a" / "pocketllm-adapter.json").unlink()  # as if trained elsewhere
    with pytest.raises(ConfigError, match=r"made for .*/c, does not fit .*/other"):
        pocketllm.merge(tmp_path / "other", tmp_path / "a", tmp_path / "o")


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("adapter_model.safetensors", 3000, "not a readable safetensors file"),
        ("adapter_model.safetensors", None, "missing"),
        ("adapter_config.json", b"[]", r"damaged \(not an object\)"),
        ("adapter_config.json", b"{}", r"damaged \(no peft_type in it\)"),
        ("adapter_config.json", b"\xff", r"damaged \(.*can't decode"),
        ("pocketllm-adapter.json", b"{", r"damaged \(Expecting"),
        ("pocketllm-adapter.json", b'{"base_identity": "x"}', r"damaged \(no base in it\)"),
    ],
)
def test_a_damaged_adapter_is_named_before_the_model_is_loaded(
    name: str, content: bytes | int | None, words: str, made: Path, tmp_path: Path
) -> None:
    """content: of the file instead of its own; None: no file; a number: its first bytes."""
    shutil.copytree(made / "a", tmp_path / "a")
    path = tmp_path / "a" / name
    complete = path.read_bytes()
    path.unlink()
    if content is not None:
        path.write_bytes(complete[:content] if isinstance(content, int) else content)
    with pytest.raises(FormatError, match=rf"{name}: {words}.*; fetch or train the adapter again"):
        check_adapter(tmp_path / "a", made / "c")


def test_an_adapter_that_peft_cannot_read_or_would_leave_empty(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "a", tmp_path / "a")
    base = open_base(made / "c", None)
    weights, settings = (tmp_path / "a" / n for n in ("adapter_model.safetensors", "adapter_config.json"))
    tensors = load_file(weights)
    first = min(tensors)
    save_file({name: tensor for name, tensor in tensors.items() if name != first}, weights)
    with (
        pytest.warns(UserWarning, match="missing adapter keys"),
        pytest.raises(FormatError, match=rf"adapter_model\.safetensors: lacks {first} \(1 of 28 tensors\)"),
    ):
        attach_adapter(base.load("packed", "cpu"), made / "c", tmp_path / "a")
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "lora_alpha": None}))
    with pytest.raises(FormatError, match=r"adapter_config\.json: PEFT cannot read it \(TypeError"):
        attach_adapter(base.load("packed", "cpu"), made / "c", tmp_path / "a")


def test_the_defaults_are_the_papers_recipe() -> None:
    recipe = LoraTuneConfig()
    assert (recipe.rank, recipe.alpha, recipe.epochs, recipe.learning_rate) == (32, 64, 3, 1e-4)
    assert recipe.loop.batch_size == 16
    assert recipe.steps is None


def test_a_loss_that_is_not_finite_stops_it(made: Path, tmp_path: Path) -> None:
    bad = config(made, learning_rate=1e30, loop={"warmup": 0.0})
    with pytest.raises(TrainingError, match=r"step \d: the .*loss is .*stopped"):
        pocketllm.lora(made / "c", tmp_path / "a", bad)
    assert not (tmp_path / "a").exists()


def test_an_output_in_use_is_refused(made: Path, tmp_path: Path) -> None:
    (tmp_path / "a.partial").mkdir()
    with locked(tmp_path / "a.partial"):
        (tmp_path / "a.partial" / "state.json").write_text("{}")
        with pytest.raises(OutputError, match="in use by another process"):
            pocketllm.lora(made / "c", tmp_path / "a", config(made))


def test_settings_are_written_in_the_same_order_each_time(made: Path) -> None:
    names = json.loads((made / "a" / "adapter_config.json").read_text())["target_modules"]
    assert len(names) == 14
    assert names == sorted(names)


def test_bytes_of_the_adapter_count_in_every_size(made: Path) -> None:
    report = read_report(made / "c")
    nbytes = folder_bytes(made / "a")
    found = counting_adapter(report, nbytes)
    assert found["bytes_on_disk"] == folder_bytes(made / "c") + nbytes
    assert sum(found["bytes_by_part"].values()) == found["bytes_on_disk"]
    ratio = report["bytes_on_disk"] / found["bytes_on_disk"]
    assert found["ratio_files_bf16"] == pytest.approx(ratio * report["ratio_files_bf16"], rel=1e-5)
    encoded = sum(m["shape"][0] * m["shape"][1] for m in report["matrices"])
    blocks = encoded - 96 * 36  # the embedding
    every = encoded + 5 * 36  # norms
    for key, weights in (("bpw_matrices", encoded), ("bpw_blocks", blocks), ("bpw_all", every)):
        assert found[key] - report[key] == pytest.approx(8 * nbytes / weights, rel=1e-4)
    assert found["ratio_matrices_fp32"] == pytest.approx(32 / found["bpw_matrices"], rel=1e-4)
    side = compare([made / "c"], adapters=[made / "a"]).models
    assert [m.bytes_on_disk for m in side] == [report["bytes_on_disk"], found["bytes_on_disk"]]
    assert [m.bpw_all for m in side] == [report["bpw_all"], found["bpw_all"]]
    assert [m.name for m in side] == ["c", "c + a"]
    assert None not in (side[0].nmse, side[0].nmse_blocks)
    assert (side[1].nmse, side[1].nmse_blocks, side[1].proxy_error) == (None, None, None)
    assert "nmse of the blocks" in picture_of(compare([made / "c"], adapters=[made / "a"]))


def picture_of(found: Comparison) -> str:
    """Its SVG, with text as text."""
    return draw(found)[1].decode()


def test_compare_finds_the_base_and_its_evaluations(made: Path, tmp_path: Path) -> None:
    pocketllm.compress(made / "m", tiny.settings(seed=1), tmp_path / "other")
    values = {"compressed": True, "text": "t", "context": 8, "model": str(made / "c")}
    given = [
        Evaluation.from_dict({**values, "perplexity": 9.0}),
        Evaluation.from_dict({**values, "perplexity": 7.0, "adapter": str(made / "a")}),
    ]
    found = compare([tmp_path / "other", made / "c"], given, adapters=[made / "a"]).models
    assert [(m.name, m.perplexity) for m in found] == [("other", None), ("c", 9.0), ("c + a", 7.0)]
    with pytest.raises(ConfigError, match="fits none of the models to compare"):
        compare([tmp_path / "other"], adapters=[made / "a"])
    with pytest.raises(ConfigError, match=r"with .*/a: was evaluated, but is not among the models"):
        compare([made / "c"], given)
