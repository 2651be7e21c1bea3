"""Which files of a dense model's folder are read, which come along, and which are left and why."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pocketllm
from pocketllm.errors import SourceError
from pocketllm.source.folder import load_dense
from pocketllm.source.hub import HUB_IGNORED
from pocketllm.source.model_files import companions, weight_files
from tests import tiny
from tests.commands import Run


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "dense")


def test_named_chat_templates_come_along(dense: Path, tmp_path: Path) -> None:
    """transformers stores all but the default one in a folder of their own."""
    tokenizer = tiny.tokenizer()
    tokenizer.chat_template = {"default": "{{ messages[0]['content'] }}", "tool_use": "TOOLS"}
    tokenizer.save_pretrained(dense)
    (dense / "README.md").write_text("about the model")
    (dense / "examples").mkdir()
    (dense / "examples" / "a.txt").write_text("an example")
    planned = pocketllm.dry_run(dense, tiny.settings())
    report = pocketllm.compress(dense, tiny.settings(), tmp_path / "out")
    assert planned.bytes_on_disk == report.bytes_on_disk == _bytes(tmp_path / "out")
    assert report.bytes_by_part["other_files"] == planned.bytes_by_part["other_files"]
    moved = {"README.md": "README.base.md"}  # the model card takes its place
    for name in ("additional_chat_templates/tool_use.jinja", "README.md", "examples/a.txt"):
        assert (tmp_path / "out" / moved.get(name, name)).read_bytes() == (dense / name).read_bytes()
    assert "left_out" not in json.loads((tmp_path / "out" / "pocketllm.json").read_text())
    _, tokenizer = pocketllm.load(tmp_path / "out")
    talk = [{"role": "user", "content": "hi"}]
    assert tokenizer.apply_chat_template(talk, tokenize=False, chat_template="tool_use") == "TOOLS"
    (tmp_path / "out" / "examples" / "a.txt").write_text("another")
    with pytest.raises(pocketllm.errors.FormatError, match=r"examples/a\.txt: 7 bytes, wanted 10"):
        pocketllm.load(tmp_path / "out")


def test_what_is_left_is_said(dense: Path, tmp_path: Path, run: Run) -> None:
    (dense / "optimizer.pt").write_bytes(b"x")
    (dense / "model.onnx").write_bytes(b"x")
    (dense / "consolidated.safetensors").write_bytes((dense / "model.safetensors").read_bytes())
    (dense / "adapter_config.json").write_text("{}")
    (dense / "original").mkdir()
    for name in ("consolidated.00.pth", "params.json"):
        (dense / "original" / name).write_bytes(b"x")
    report = pocketllm.compress(dense, tiny.settings(), tmp_path / "out")
    assert report.left_out == {
        "adapter_config.json": "an adapter, which is not part of the model",
        "consolidated.safetensors": "not the model's weights",
        "model.onnx": "weights for another framework",
        "optimizer.pt": "a pickle, which is never read",
        "original/": "holds weights of its own",
    }
    code, out, _ = run("info", tmp_path / "out")
    assert code == 0 and "original/: holds weights of its own" in out
    assert not {path.name for path in (tmp_path / "out").rglob("*")} & {"original", "params.json"}


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_the_hub_delivers_every_file_that_comes_along(dense: Path) -> None:
    """A download must bring every file that is checked."""
    from huggingface_hub.utils import filter_repo_objects

    (dense / "additional_chat_templates").mkdir()
    (dense / "additional_chat_templates" / "tool_use.jinja").write_text("x")
    kept, _ = companions(dense)
    wanted = [*kept, "config.json", "pocketllm.json", "model.safetensors", "model.safetensors.index.json"]
    assert list(filter_repo_objects(wanted, ignore_patterns=HUB_IGNORED)) == wanted
    left = ["pytorch_model.bin", "original/params.json", "onnx/model.onnx", "unet/x.safetensors"]
    assert list(filter_repo_objects(left, ignore_patterns=HUB_IGNORED)) == []


def test_an_index_names_safetensors_of_the_folder(dense: Path) -> None:
    for name in ("weights.bin", "../model.safetensors", "/x/model.safetensors"):
        index = {"weight_map": {"lm_head.weight": name}}
        (dense / "model.safetensors.index.json").write_text(json.dumps(index))
        for read in (weight_files, load_dense, lambda folder: pocketllm.dry_run(folder, tiny.settings())):
            with pytest.raises(SourceError, match=r"only \*\.safetensors in the same folder are read"):
                read(dense)
    (dense / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    with pytest.raises(SourceError, match="names no file"):
        weight_files(dense)


@pytest.mark.parametrize("named", ["weights.bin", "../model.safetensors", 5])
def test_the_configuration_names_safetensors_of_the_folder(named: object, dense: Path) -> None:
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps({**config, "transformers_weights": named}))
    for read in (weight_files, load_dense):
        with pytest.raises(SourceError, match="transformers_weights: got"):
            read(dense)


def test_weights_that_the_configuration_names_are_those_that_are_read(dense: Path, tmp_path: Path) -> None:
    config = json.loads((dense / "config.json").read_text())
    (dense / "model.safetensors").rename(dense / "own.safetensors")
    tensors = load_file(dense / "own.safetensors")
    save_file(
        {name: value * 2 for name, value in tensors.items()}, dense / "model.safetensors", {"format": "pt"}
    )
    (dense / "config.json").write_text(json.dumps({**config, "transformers_weights": "own.safetensors"}))
    assert weight_files(dense) == [dense / "own.safetensors"]
    assert torch.equal(load_dense(dense).model.norm.weight, tensors["model.norm.weight"])
    pocketllm.compress(dense, tiny.settings(), tmp_path / "out")
    model, _ = pocketllm.load(tmp_path / "out")
    assert torch.equal(model.model.norm.weight, tensors["model.norm.weight"])


def test_two_sets_of_weights_are_ambiguous(dense: Path) -> None:
    tensors = load_file(dense / "model.safetensors")
    save_file(tensors, dense / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (dense / "model.safetensors.index.json").write_text(json.dumps(index))
    for read in (weight_files, load_dense):
        with pytest.raises(SourceError, match="two sets of weights; remove the one"):
            read(dense)
    (dense / "model.safetensors").unlink()
    assert [file.name for file in weight_files(dense)] == ["model-00001-of-00001.safetensors"]


@pytest.mark.parametrize("name", ["pytorch_model.safetensors", "model.fp16.safetensors"])
def test_the_only_weights_are_taken_whatever_their_name(name: str, dense: Path, tmp_path: Path) -> None:
    expected = load_file(dense / "model.safetensors")["model.norm.weight"]
    (dense / "model.safetensors").rename(dense / name)
    assert torch.equal(load_dense(dense).model.norm.weight, expected)
    pocketllm.compress(dense, tiny.settings(), tmp_path / "out")
    save_file({"x": torch.ones(1)}, dense / "other.safetensors")
    for read in (weight_files, load_dense):
        with pytest.raises(SourceError, match=r"several .* neither model\.safetensors nor an index"):
            read(dense)


def test_the_only_index_is_taken_whatever_its_name(dense: Path) -> None:
    tensors = load_file(dense / "model.safetensors")
    (dense / "model.safetensors").rename(dense / "weights-1.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "weights-1.safetensors")}
    (dense / "own.safetensors.index.json").write_text(json.dumps(index))
    assert weight_files(dense) == [dense / "weights-1.safetensors"]
    assert torch.equal(load_dense(dense).model.norm.weight, tensors["model.norm.weight"])
    (dense / "two.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SourceError, match="several indexes"):
        weight_files(dense)


def test_all_shards_without_their_index(dense: Path) -> None:
    tensors = load_file(dense / "model.safetensors")
    (dense / "model.safetensors").unlink()
    for number, names in enumerate((list(tensors)[:3], list(tensors)[3:]), 1):
        part = {name: tensors[name] for name in names}
        save_file(part, dense / f"model-0000{number}-of-00002.safetensors", {"format": "pt"})
    assert len(weight_files(dense)) == 2
    (dense / "model-00001-of-00002.safetensors").rename(dense / "model-00003-of-00002.safetensors")
    with pytest.raises(SourceError, match="several"):
        weight_files(dense)


def test_an_adapter_beside_dense_weights_is_not_applied_unasked(dense: Path) -> None:
    (dense / "adapter_config.json").write_text("{}")
    with pytest.raises(SourceError, match=r"adapter_config\.json: an adapter next to the weights"):
        load_dense(dense)


def test_links(dense: Path, tmp_path: Path) -> None:
    """Nothing of somebody else's is copied into a model; the hub's cache consists of links."""
    secret = tmp_path / "secret"
    secret.write_text("x")
    (dense / "LICENSE").symlink_to(secret)
    with pytest.raises(SourceError, match="LICENSE: a link that leads out of the folder"):
        pocketllm.dry_run(dense, tiny.settings())
    (dense / "LICENSE").unlink()
    (dense / "elsewhere").symlink_to(tmp_path, target_is_directory=True)
    with pytest.raises(SourceError, match="elsewhere: a link to a folder"):
        pocketllm.dry_run(dense, tiny.settings())
    (dense / "elsewhere").unlink()
    (dense / "model.safetensors").rename(tmp_path / "model.safetensors")
    (dense / "model.safetensors").symlink_to(tmp_path / "model.safetensors")
    for read in (weight_files, load_dense):
        with pytest.raises(SourceError, match=r"model\.safetensors: a link that leads out"):
            read(dense)
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (dense / "model.safetensors").unlink()
    (tmp_path / "model.safetensors").rename(dense / "model.safetensors")
    for path in dense.iterdir():
        path.rename(blobs / f"blob-{path.name}")
        (snapshot / path.name).symlink_to(os.path.relpath(blobs / f"blob-{path.name}", snapshot))
    assert pocketllm.dry_run(snapshot, tiny.settings()).bytes_on_disk > 0
    load_dense(snapshot)


def test_a_tokenizer_of_another_model(dense: Path, run: Run) -> None:
    (dense / "added_tokens.json").write_text('{"hello": 96}')
    from pocketllm.text.vocabulary import check_tokens

    check_tokens(tiny.model(), torch.tensor([95]))
    with pytest.raises(
        SourceError, match="the tokenizer produces token 96, the model's embedding has 96 rows"
    ):
        check_tokens(tiny.model(), torch.tensor([[3, 96]]))
    code, _, err = run("generate", dense, "--prompt", "hello")
    assert code == 1 and "belongs to another model" in err
