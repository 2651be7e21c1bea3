"""Bad models: a clear error and nothing half-written; odd but legal weights: coded as well as can be."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pocketllm
from pocketllm.errors import ConfigError, FormatError, PocketError, SourceError, WeightError
from pocketllm.format.report_warnings import warnings_of
from pocketllm.runtime.export import save_dense
from pocketllm.source.folder import load_dense
from tests import tiny

UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "dense")


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    """Rewrite the weights of a model folder."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def refused(model: Path | str, output: Path, error: type[PocketError], words: str, **changes: Any) -> None:
    """Refused before anything is written: not even the folder of a half-done run is left."""
    before = sorted(output.parent.iterdir())
    with pytest.raises(error, match=words):
        pocketllm.compress(model, tiny.settings(**changes), output)
    assert sorted(output.parent.iterdir()) == before


def test_missing_folder(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", tmp_path / "out", SourceError, "no such folder")


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path / "out", SourceError, r"no config\.json")


def test_a_file_instead_of_a_folder(source: Path, tmp_path: Path) -> None:
    refused(source / "model.safetensors", tmp_path / "out", SourceError, "a file; wanted a model folder")


def test_no_safetensors(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").unlink()
    refused(source, tmp_path / "out", SourceError, r"no \*\.safetensors file")


def test_pickles_are_never_loaded(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    refused(source, tmp_path / "out", SourceError, "pickles can run code and are never loaded")


@pytest.mark.parametrize("beside", [None, "optimizer.safetensors"])
def test_a_dense_model_is_never_loaded_from_a_pickle(source: Path, beside: str | None) -> None:
    """Not even a whole one, nor where some other file is in the safe form."""
    weights = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    torch.save(weights, source / "pytorch_model.bin")
    if beside is not None:
        save_file({"step": torch.ones(1)}, source / beside)
    with pytest.raises(SourceError, match="never loaded" if beside is None else "cannot load this model"):
        load_dense(source)


def test_damaged_safetensors(source: Path, tmp_path: Path) -> None:
    path = source / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    refused(source, tmp_path / "out", SourceError, r"model\.safetensors: not a readable safetensors file")


def test_a_pointer_of_git_lfs(source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    refused(
        source, tmp_path / "out", SourceError, "a pointer of Git LFS, not the weights; run 'git lfs pull'"
    )


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer_config.json", "{"),
        ("generation_config.json", "{"),
        ("generation_config.json", "[]"),
        ("generation_config.json", '{"eos_token_id": "x"}'),
        ("generation_config.json", '{"eos_token_id": [1, null]}'),
        ("generation_config.json", '{"bos_token_id": {}}'),
        ("generation_config.json", '{"pad_token_id": 1180591620717411303424}'),
        ("generation_config.json", '{"max_new_tokens": -1}'),
    ],
)
def test_what_comes_along_is_looked_at_before_the_work(
    name: str, text: str, source: Path, tmp_path: Path
) -> None:
    """Also without calibration, which needs no tokenizer: the result could not be loaded."""
    (source / name).write_text(text)
    words = "its tokenizer cannot be read" if "tokenizer" in name else f"{name}: damaged"
    refused(source, tmp_path / "out", SourceError, words)
    if "generation" in name:
        with pytest.raises(SourceError, match=words):
            load_dense(source)


def test_options_of_calls_in_the_configuration(source: Path, tmp_path: Path) -> None:
    """Outputs are asked for by name, whatever config.json says; what cannot be saved is named."""
    config = json.loads((source / "config.json").read_text())
    options = {"return_dict": False, "output_attentions": True}
    (source / "config.json").write_text(json.dumps({**config, **options}))
    assert load_dense(source)(torch.arange(9)[None]).logits.shape == (1, 9, 96)
    pocketllm.compress(source, tiny.settings(), tmp_path / "out")
    model, _ = pocketllm.load(tmp_path / "out")
    assert model(torch.arange(9)[None]).logits.shape == (1, 9, 96)
    with pytest.raises(
        FormatError, match=r"cannot save the decoded model .*output_attentions.*; correct its"
    ):
        save_dense(model, None, tmp_path / "exported")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dense", "out"]


@pytest.mark.skipif(sys.platform == "win32", reason="needs FIFOs")
def test_what_cannot_be_copied_is_found_before_the_work(source: Path, tmp_path: Path) -> None:
    os.mkfifo(source / "notes.txt")
    refused(source, tmp_path / "out", SourceError, r"notes\.txt: not a regular file")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_no_numbers(value: float, source: Path, tmp_path: Path) -> None:
    change(source, lambda tensors: tensors[UP].__setitem__((3, 4), value))
    refused(source, tmp_path / "out", WeightError, r"up_proj\.weight in model\.safetensors: 1 of 1872 values")


def test_a_bad_norm_is_found_as_early_as_a_bad_matrix(source: Path, tmp_path: Path) -> None:
    change(source, lambda tensors: tensors["model.norm.weight"].__setitem__(3, float("nan")))
    refused(source, tmp_path / "out", WeightError, r"model\.norm\.weight in .*: 1 of 36 values are NaN")


def test_values_whose_squares_overflow(source: Path, tmp_path: Path) -> None:
    change(source, lambda tensors: tensors[UP].__setitem__((3, 4), -1e20))
    refused(
        source, tmp_path / "out", WeightError, r"1 of 1872 values are beyond 1e\+15; the checkpoint is dam"
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool])
def test_unsupported_dtype(dtype: torch.dtype, source: Path, tmp_path: Path) -> None:
    change(source, lambda tensors: tensors.update({UP: tensors[UP].to(dtype)}))
    refused(source, tmp_path / "out", WeightError, f"{UP}: stored as (I8|F8_E4M3|BOOL)")
    with pytest.raises(WeightError, match="stored as"):
        pocketllm.dry_run(source, tiny.settings())


def test_wrong_shape(source: Path, tmp_path: Path) -> None:
    change(source, lambda tensors: tensors.update({UP: tensors[UP][:-1].clone()}))
    refused(
        source,
        tmp_path / "out",
        WeightError,
        r"stored with shape \(51, 36\), wanted \(52, 36\) as in the model",
    )


def test_missing_parameter(source: Path, tmp_path: Path) -> None:
    change(source, lambda tensors: tensors.pop(UP))
    refused(source, tmp_path / "out", SourceError, f"no file contains {UP}")


def test_weights_that_the_model_does_not_use_are_a_warning(source: Path) -> None:
    assert warnings_of(pocketllm.dry_run(str(source), tiny.settings()).to_dict()) == []
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    (found,) = warnings_of(pocketllm.dry_run(str(source), tiny.settings()).to_dict())
    assert "left out 9 tensors (model.layers.1.input_layernorm.weight and others), for which the" in found


def test_missing_shard(source: Path, tmp_path: Path) -> None:
    index = {"weight_map": {UP: "model-00002-of-00002.safetensors"}}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(source, tmp_path / "out", SourceError, r"model-00002-of-00002\.safetensors is named")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": ["a"]}'])
def test_damaged_index(text: str, source: Path, tmp_path: Path) -> None:
    (source / "model.safetensors.index.json").write_text(text)
    refused(source, tmp_path / "out", SourceError, r"model\.safetensors\.index\.json: damaged")


def test_a_second_copy_of_the_weights_is_not_mixed_in(source: Path, tmp_path: Path) -> None:
    save_file({UP: torch.zeros(52, 36)}, source / "consolidated.safetensors")
    weight, _ = reloaded(source, tmp_path, UP)
    assert weight.any()


def test_already_quantized(source: Path, tmp_path: Path) -> None:
    pocketllm.compress(source, tiny.settings(), tmp_path / "small")
    refused(tmp_path / "small", tmp_path / "out", SourceError, "already quantized")


def test_unknown_architecture(source: Path, tmp_path: Path) -> None:
    (source / "config.json").write_text('{"model_type": "perceptron", "architectures": ["Perceptron"]}')
    refused(source, tmp_path / "out", SourceError, "transformers cannot build this model")


def test_config_that_is_no_json(source: Path, tmp_path: Path) -> None:
    (source / "config.json").write_text("{")
    refused(source, tmp_path / "out", SourceError, "transformers cannot build this model")


@pytest.mark.parametrize(
    "changes",
    [{"hidden_size": "wide"}, {"hidden_size": -36}, {"num_attention_heads": 0}, {"num_hidden_layers": 3}],
)
def test_config_that_makes_no_sense(changes: dict[str, Any], source: Path, tmp_path: Path) -> None:
    config = {**json.loads((source / "config.json").read_text()), **changes}
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(SourceError) as caught:
        pocketllm.compress(source, tiny.settings(), tmp_path / "out")
    assert str(source) in str(caught.value)


def test_code_in_the_folder_is_not_run(source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    config["model_type"] = "own"
    config["auto_map"] = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (source / "config.json").write_text(json.dumps(config))
    (source / "own.py").write_text(f"open({str(tmp_path / 'owned')!r}, 'w')")
    refused(source, tmp_path / "out", SourceError, "custom code.*--trust-remote-code")
    assert not (tmp_path / "owned").exists()


def test_hub_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def unreachable(*arguments: Any, **keywords: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    refused("owner/name", tmp_path / "out", SourceError, "owner/name: .*no route to host")


def test_a_missing_folder_is_not_only_called_a_hub_id(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def unknown(*arguments: Any, **keywords: Any) -> None:
        raise OSError("404")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unknown)
    monkeypatch.chdir(tmp_path)
    words = r"^dense/name: no such folder in dense, and the Hub lookup failed \(404\)"
    refused("dense/name", tmp_path / "out", SourceError, words)
    refused(
        "owner/name", tmp_path / "out", SourceError, "^owner/name: no local folder, and the Hub lookup failed"
    )


def test_files_of_weights_and_adapters_are_not_copied(source: Path, tmp_path: Path) -> None:
    left_out = ["pytorch_model.bin.index.json", "adapter_config.json", "pocketllm-merged.json"]
    for name in [*left_out, "vocab.json"]:
        (source / name).write_text("{}")
    index = {"weight_map": dict.fromkeys(load_file(source / "model.safetensors"), "model.safetensors")}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    report = pocketllm.compress(source, tiny.settings(), tmp_path / "out")
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert "vocab.json" in files and not files & {*left_out, "model.safetensors.index.json"}
    assert report.bytes_on_disk == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())


def test_more_codewords_than_subvectors(source: Path, tmp_path: Path) -> None:
    refused(source, tmp_path / "out", ConfigError, "codebook_size: got 1024, but only", codebook_size=1024)


def reloaded(source: Path, tmp_path: Path, name: str, **changes: Any) -> tuple[torch.Tensor, Any]:
    report = pocketllm.compress(source, tiny.settings(**changes), tmp_path / "out")
    model, _ = pocketllm.load(tmp_path / "out", mode="dense")
    return model.get_parameter(name), {m.name: m for m in report.matrices}[name]


def test_zero_matrix(source: Path, tmp_path: Path) -> None:
    change(source, lambda tensors: tensors[UP].zero_())
    weight, facts = reloaded(source, tmp_path, UP)
    assert not weight.any() and facts.nmse == 0.0


@pytest.mark.parametrize("form", ["row", "lookup"])
def test_zero_rows_stay_zero(form: str, source: Path, tmp_path: Path) -> None:
    change(source, lambda tensors: tensors[UP].__setitem__([0, 7], 0))
    weight, facts = reloaded(source, tmp_path, UP, codec={"decoder": form})
    assert not weight[[0, 7]].any() and weight[1].any()
    assert 0 < facts.nmse < 1


def test_numbers_too_small_to_square_are_not_called_exact(source: Path, tmp_path: Path) -> None:
    change(source, lambda tensors: tensors[UP].mul_(1e-30))
    weight, facts = reloaded(source, tmp_path, UP)
    assert not weight.any() and facts.nmse == 1.0


def test_decoding_to_no_numbers_is_an_error(source: Path, tmp_path: Path) -> None:
    """Without a row scale the codebook holds the weights themselves, and float16 ends at 65504."""
    change(source, lambda tensors: [tensors[n].mul_(1e8) for n in tensors if "up_proj" in n])
    with pytest.raises(WeightError, match=r"up_proj\.weight: decodes to non-finite values"):
        pocketllm.compress(source, tiny.settings(codec={"row_scale": False}), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_constant_matrix(source: Path, tmp_path: Path) -> None:
    change(source, lambda tensors: tensors[UP].fill_(0.25))
    weight, _ = reloaded(source, tmp_path, UP, codebook_scope="matrix", vector_len=4, codebook_size=4)
    assert torch.allclose(weight, torch.tensor(0.25), rtol=0.01)


def test_matrices_that_coding_would_not_make_smaller_stay_dense(tmp_path: Path) -> None:
    source = tiny.save(tmp_path / "dense", intermediate_size=1)
    report = pocketllm.compress(source, tiny.settings(codebook_size=8), tmp_path / "out")
    skipped = {entry["name"]: entry["reason"] for entry in report.skipped}
    assert "smaller" in skipped["model.layers.0.mlp.down_proj.weight"]
    model, _ = pocketllm.load(tmp_path / "out", mode="dense")
    original = load_file(source / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, original)


def test_one_by_one_matrices(tmp_path: Path) -> None:
    source = tiny.save(
        tmp_path / "dense", intermediate_size=1, hidden_size=1, num_attention_heads=1, head_dim=2
    )
    refused(source, tmp_path / "out", ConfigError, "codebook_size: got 32, but only 2 subvectors")
    with pytest.raises(ConfigError, match="too small"):
        pocketllm.compress(source, tiny.target(4.0), tmp_path / "out")


def test_nothing_left_to_compress(source: Path, tmp_path: Path) -> None:
    refused(source, tmp_path / "out", ConfigError, "leave none", dense_first=1, dense_last=1)
