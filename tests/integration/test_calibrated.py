"""The calibrated path on tiny models: every architecture, same bytes every time, resuming, reuse."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pocketllm
from pocketllm.calibrate.calibration import read_windows
from pocketllm.compression import compress_job, encode_blocks, pipeline
from pocketllm.compression.progress import Event
from pocketllm.errors import ConfigError, ResumeError, SourceError
from pocketllm.format.report_warnings import warnings_of
from pocketllm.runtime.layers import packed_matrices
from pocketllm.source.dense_checkpoint import open_dense
from tests import tiny
from tests.commands import contents, kill_now, killed
from tests.integration.test_architectures import load, logits
from tests.numerics.test_input_hessians import shun_expert


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("calibrated") / "dense")


def compress(source: Path, config: pocketllm.CompressConfig, output: Path, **how: Any) -> pocketllm.Report:
    """With a folder of its own for measurements, so that nothing is taken from another test."""
    how.setdefault("calibration_folder", output.parent / f"{output.name}-measured")
    return pocketllm.compress(source, config, output, **how)


@pytest.mark.parametrize("architecture", [*tiny.ARCHITECTURES, *tiny.MIXED])
def test_every_architecture(architecture: str, tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "dense", architecture)
    config = tiny.on_trellis(calibration={"refine_epochs": 1, "compensate": 1})
    planned = pocketllm.dry_run(source, config, calibration_folder=tmp_path / "measured")
    report = compress(source, config, tmp_path / "out", calibration_folder=tmp_path / "measured")
    assert report.bytes_on_disk == planned.bytes_on_disk
    assert {m.name: m.bpw for m in report.matrices} == {m.name: m.bpw for m in planned.matrices}
    assert 5.0 < report.bpw_matrices <= 6.0
    for matrix in report.matrices:
        assert matrix.proxy_error is not None and 0 < matrix.proxy_error < 1.0, matrix.name
        in_blocks = matrix.input_tokens is not None
        assert in_blocks == (".0." in matrix.name or ".1." in matrix.name)
        if in_blocks:
            # Two experts a token; 128 tokens where inputs are weighted by what was measured on these.
            assert matrix.input_tokens in ((1024,) if len(matrix.shape) == 3 else (512, 128))
    assert not warnings_of(report.to_dict())
    models = [load(tmp_path / "out", mode) for mode in ("dense", "packed")]
    torch.testing.assert_close(logits(models[0]), logits(models[1]), rtol=1e-4, atol=1e-4)
    assert set(packed_matrices(models[1])) == {m.name for m in report.matrices}


def test_the_plan_of_a_large_model_measures_only_what_is_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pipeline, "_MEASURED_BY_PLANS", 1000)
    config = tiny.on_trellis()
    with monkeypatch.context() as patched:
        patched.setattr(compress_job, "calibrate", None)
        patched.setattr(compress_job, "check_blocks", None)  # which loads a block
        planned = pocketllm.dry_run(source, config)
    (message,) = caplog.messages
    assert message.startswith(
        "plan of 0.0 billion weights: sensitivities were not measured; errors in all weights"
    )
    assert (
        config.target_bpw is not None and 0.98 * config.target_bpw < planned.bpw_matrices <= config.target_bpw
    )
    pocketllm.dry_run(source, config, calibration_folder=tmp_path)
    assert list(tmp_path.glob("sensitivity-*.safetensors")) and len(caplog.messages) == 1
    with pytest.raises(SourceError, match="no-such-text"):
        pocketllm.dry_run(source, tiny.on_trellis(calibration={"texts": ("no-such-text",)}))


def test_what_layers_compute_is_closer_than_without_calibration(tmp_path: Path) -> None:
    """At equal bits, on the text it was calibrated on: the outputs of the model, against the dense ones."""
    source = tiny.save(tmp_path / "dense", hidden_size=64, intermediate_size=96, head_dim=32)
    calibrated = tiny.on_trellis(3.0, vector_len=2)
    plain = replace(calibrated, calibration=None)
    reference, errors = logits(load_dense(source)), []
    for name, config in (("calibrated", calibrated), ("plain", plain)):
        compress(source, config, tmp_path / name)
        errors.append(float((logits(load(tmp_path / name, "dense")) - reference).square().mean()))
    assert errors[0] < 0.8 * errors[1]


def load_dense(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


REFINED = {"refine_epochs": 1}


@pytest.fixture(scope="module")
def whole(source: Path) -> Path:
    """The output of an unbroken run, its blocks refined."""
    compress(source, tiny.on_trellis(calibration=REFINED), source.parent / "whole")
    return source.parent / "whole"


def test_same_arguments_same_bytes(source: Path, whole: Path, tmp_path: Path) -> None:
    compress(source, tiny.on_trellis(calibration=REFINED), tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)


def test_same_bytes_with_matrices_side_by_side(source: Path, tmp_path: Path) -> None:
    torch.set_num_threads(2)
    try:
        for name in ("one", "other"):
            compress(source, tiny.on_trellis(), tmp_path / name)
    finally:
        torch.set_num_threads(1)
    assert contents(tmp_path / "one") == contents(tmp_path / "other")


@pytest.mark.parametrize(
    ("stage", "detail"),
    [
        ("measure", "sensitivity"),
        ("encode", "embed_tokens"),
        ("encode", "layers.0: refinement"),
        ("encode", "layers.1.self_attn.o_proj"),
        ("write", "checkpoint"),
    ],
)
def test_killed_and_started_again(stage: str, detail: str, source: Path, whole: Path, tmp_path: Path) -> None:
    def progress(event: Event) -> None:
        if event.stage == stage and detail in event.detail:
            kill_now()

    config = tiny.on_trellis(calibration=REFINED)
    killed(lambda: compress(source, config, tmp_path / "out", progress=progress))
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    compress(source, config, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(whole)


class StoppedError(Exception):
    pass


def test_other_text_on_a_half_done_output(source: Path, tmp_path: Path) -> None:
    """The name of the text is the same, what it holds is not."""

    def stop(event: Any) -> None:
        if event.stage == "encode" and "layers.1" in event.detail:
            raise StoppedError

    text = tmp_path / "text.txt"
    text.write_text("some words to begin with. " * 100)
    config = tiny.on_trellis(calibration={"texts": (str(text),)})
    with pytest.raises(StoppedError):
        compress(source, config, tmp_path / "out", progress=stop)
    text.write_text("other words to go on with. " * 100)
    with pytest.raises(ResumeError, match="calibration_text"):
        compress(source, config, tmp_path / "out")


def test_dense_inputs_are_kept_and_used_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    apart = tiny.on_trellis(calibration={"sequential": False})
    blocks = 2
    other = replace(apart, target_bpw=5.0)  # other bits, the same inputs
    measured = tmp_path / "measured"
    compress(source, apart, tmp_path / "first", calibration_folder=measured)
    kept = sorted(path.relative_to(measured).as_posix() for path in measured.rglob("*.safetensors"))
    assert len(kept) == 1 + 2 * blocks and sum("sensitivity" in name for name in kept) == 1
    compress(source, other, tmp_path / "fresh")  # measures everything itself

    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("the model is run again")

    monkeypatch.setattr(encode_blocks, "BlockStream", refuse)
    compress(source, apart, tmp_path / "again", calibration_folder=measured)
    assert contents(tmp_path / "again") == contents(tmp_path / "first")
    compress(source, other, tmp_path / "other", calibration_folder=measured)
    assert contents(tmp_path / "other") == contents(tmp_path / "fresh")
    text = replace(apart.calibration, tokens=1024) if apart.calibration else None
    with pytest.raises(AssertionError, match="run again"):  # another text is another measurement
        compress(source, replace(apart, calibration=text), tmp_path / "text", calibration_folder=measured)


def test_inputs_depend_on_the_blocks_before_only_in_sequence(source: Path, tmp_path: Path) -> None:
    """The first block sees the same either way but for the embedding; all later ones do not."""
    weights = []
    for sequential in (True, False):
        config = tiny.on_trellis(4.0, keep_embeddings=True, calibration={"sequential": sequential})
        compress(source, config, tmp_path / str(sequential))
        weights.append(packed_matrices(load(tmp_path / str(sequential), "packed")))
    first, last = "model.layers.0.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"
    assert torch.equal(weights[0][first](), weights[1][first]())
    assert not torch.equal(weights[0][last](), weights[1][last]())


def test_refinement_brings_a_block_nearer_to_the_dense_one(source: Path, tmp_path: Path) -> None:
    """The first one, on the text that it is refined on: what it is fed is the same in either model."""
    plain = tiny.on_trellis(4.0, keep_embeddings=True, calibration={"sequential": False})
    found = read_windows(open_dense(source), plain)
    assert found is not None
    windows = found.windows

    def after_first_block(model: Any) -> Tensor:
        with torch.no_grad():
            return model(windows, output_hidden_states=True).hidden_states[1]

    wanted, errors = after_first_block(load_dense(source)), []
    for epochs in (0, 8):
        config = tiny.on_trellis(
            4.0, keep_embeddings=True, calibration={"sequential": False, "refine_epochs": epochs}
        )
        compress(source, config, tmp_path / str(epochs))
        found = after_first_block(load(tmp_path / str(epochs), "dense"))
        errors.append(float((found - wanted).square().mean()))
    assert errors[1] < 0.99 * errors[0]


@pytest.mark.parametrize(
    "setting", [{"rotate": False}, {"two_sided": False, "passes": 1}, {"weigh_tokens": False}]
)
def test_settings_for_study(setting: dict[str, Any], source: Path, tmp_path: Path) -> None:
    report = compress(source, tiny.on_trellis(calibration=setting), tmp_path / "out")
    models = [load(tmp_path / "out", mode) for mode in ("dense", "packed")]
    torch.testing.assert_close(logits(models[0]), logits(models[1]), rtol=1e-4, atol=1e-4)
    assert all(m.proxy_error < 1 for m in report.matrices if m.proxy_error is not None)


def test_experts_that_see_no_token_are_told(tmp_path: Path) -> None:
    model = tiny.model("mixtral")
    shun_expert(model, 1)
    model.save_pretrained(tmp_path / "dense")
    tiny.tokenizer().save_pretrained(tmp_path / "dense")
    report = compress(tmp_path / "dense", tiny.on_trellis(), tmp_path / "out")
    fused = {m.name: m.unseen_experts for m in report.matrices if m.unseen_experts}
    assert len(fused) == 4 and set(fused.values()) == {1}
    assert any("4 experts in 4 matrices" in text for text in warnings_of(report.to_dict()))


def test_overrides(source: Path, tmp_path: Path) -> None:
    config = tiny.on_trellis(
        5.0, overrides=(("*.v_proj.weight", 6.0), ("*.1.mlp.*", 2.0), ("*.1.mlp.up_proj.*", 16.0))
    )
    report = compress(source, config, tmp_path / "out")
    found = {m.name: m.stride / m.vector_len for m in report.matrices if m.stride}
    assert found["model.layers.0.self_attn.v_proj.weight"] == 6.0
    assert found["model.layers.1.mlp.gate_proj.weight"] == 2.0
    reasons = {entry["name"]: entry["reason"] for entry in report.skipped}
    assert reasons["model.layers.1.mlp.up_proj.weight"] == "left dense by an override"
    with pytest.raises(ConfigError, match=r"override '\*\.w_proj\.weight': matches no matrix"):
        compress(source, tiny.on_trellis(overrides=(("*.w_proj.weight", 4.0),)), tmp_path / "no")


def test_kept_embeddings_are_stored_in_16_bit(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "dense", "qwen3")
    report = compress(source, tiny.on_trellis(keep_embeddings=True), tmp_path / "out")
    assert {m.kind for m in report.matrices} & {"model.embed_tokens", "lm_head"} == set()
    assert report.bpw_matrices == report.bpw_blocks <= 6.0
    kept = [load(tmp_path / "out", "dense"), load_dense(source)]
    for get in ("get_input_embeddings", "get_output_embeddings"):
        stored, own = (getattr(model, get)().weight for model in kept)
        assert torch.equal(stored, own.bfloat16().float())
    norms = (model.model.norm.weight for model in kept)  # all else that is dense keeps its type
    assert torch.equal(*norms)
    size = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert size < 2 * 2 * 96 * 36 + report.bytes_by_part["indices"] + 30_000
