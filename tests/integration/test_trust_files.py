"""What a compressed model's folder must not hold: files that nobody has verified, pickles, links that lead out."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pocketllm
from pocketllm.errors import FormatError, LoadError, PocketError
from pocketllm.format import checkpoint as ckpt
from pocketllm.recover.adapter import check_adapter
from pocketllm.recover.base_model import open_base
from tests import tiny
from tests.commands import Run


@pytest.mark.parametrize(
    "name",
    [
        *("added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "vocab.json", "modeling.py"),
        *(
            "additional_chat_templates/tool_use.jinja",
            "generation_config.json",
            "tokenizer.model",
            "notes.txt",
        ),
        *("model.safetensors.index.json", "model-00001-of-00002.safetensors", "pytorch_model.bin"),
        *("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"),
    ],
)
def test_a_file_that_the_report_does_not_name(name: str, copy: Path) -> None:
    path = copy / name
    report = json.loads((copy / ckpt.REPORT_NAME).read_text())
    if name in report["files"]:
        del report["files"][name]
        (copy / ckpt.REPORT_NAME).write_text(json.dumps(report))
    path.parent.mkdir(exist_ok=True)
    path.write_text("{}")
    for read in (pocketllm.load, ckpt.verify, lambda folder: open_base(folder, None)):
        with pytest.raises(FormatError, match=f"{path}.*remove it"):
            read(copy)


def test_every_command_refuses_it(copy: Path, text: Path, tmp_path: Path, run: Run) -> None:
    (copy / "added_tokens.json").write_text('{"hello": 95}')
    commands: list[tuple[str | Path, ...]] = [
        ("info", copy),
        ("eval", copy, "--ppl", text),
        ("generate", copy, "--prompt", "a"),
        ("finetune", copy, "--method", "lora", "--text", text, "-o", tmp_path / "out"),
        ("merge", copy, "--adapter", tmp_path, "--to", tmp_path / "out"),
        ("export", copy, "--to", tmp_path / "out"),
        ("report", copy),
        ("compare", copy, "-o", tmp_path / "out.svg"),
    ]
    for command in commands:
        code, _, err = run(*command)
        wanted = "adapter_config.json" if command[0] == "merge" else "added_tokens.json"
        assert code == 1 and wanted in err and "Traceback" not in err, command
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["README.md", "LICENSE", "picture.png", ".gitattributes", ".cache/hub/x.json"]
)
def test_what_no_library_reads_may_lie_there(name: str, copy: Path) -> None:
    (copy / name).parent.mkdir(parents=True, exist_ok=True)
    (copy / name).write_text("x")
    ckpt.verify(copy)


def test_a_stray_weight_file_is_never_preferred_to_shards(small: Path, tmp_path: Path) -> None:
    """transformers takes model.safetensors before an index."""
    folder = Path(shutil.copytree(small, tmp_path / "copy"))
    tensors = load_file(folder / "model.safetensors")
    half = len(tensors) // 2
    names = list(tensors)
    shards = {
        "model-00001-of-00002.safetensors": names[:half],
        "model-00002-of-00002.safetensors": names[half:],
    }
    for file, part in shards.items():
        save_file({name: tensors[name] for name in part}, folder / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, part in shards.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    sign(folder, lambda files: files.pop("model.safetensors"), [*shards, "model.safetensors.index.json"])
    pocketllm.load(folder)
    save_file(
        {name: torch.zeros_like(value) for name, value in tensors.items()}, folder / "model.safetensors"
    )
    with pytest.raises(FormatError, match=r"model\.safetensors: not listed in pocketllm.json"):
        pocketllm.load(folder)
    sign(folder, lambda files: None, ["model.safetensors"])
    with pytest.raises(FormatError, match="two sets of weights"):
        pocketllm.load(folder)


def sign(folder: Path, change: Callable[[dict[str, Any]], Any], names: list[str]) -> None:
    """Make the report's checksums fit, as somebody would who writes a folder on purpose."""
    path = folder / ckpt.REPORT_NAME
    report = json.loads(path.read_text())
    change(report["files"])
    report["files"].update(ckpt.file_facts(folder, names))
    path.write_text(json.dumps(report))


@pytest.mark.parametrize("name", ["adapter_config.json", "pytorch_model.bin"])
def test_not_even_with_a_checksum(name: str, copy: Path) -> None:
    (copy / name).write_text("{}")
    sign(copy, lambda files: None, [name])
    with pytest.raises(FormatError, match=f"{name}: (an adapter inside|a pickle)"):
        pocketllm.load(copy)


@pytest.mark.parametrize("named", ["weights.bin", "../x.safetensors", "model.safetensors", 5])
def test_weights_named_in_the_configuration(named: Any, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "transformers_weights": named}))
    sign(copy, lambda files: None, ["config.json"])
    with pytest.raises(FormatError, match="transformers_weights"):
        pocketllm.load(copy)


def test_files_of_a_report_lie_in_the_folder(copy: Path) -> None:
    for name in ("../x", "/etc/passwd", "a/../../x", "a//b", "a\\b", "a\0b", ckpt.REPORT_NAME):
        sign(copy, lambda files: files.clear(), ["config.json"])
        sign(copy, lambda files, name=name: files.update({name: files["config.json"]}), [])  # type: ignore[misc]
        with pytest.raises(FormatError, match="malformed entry"):
            ckpt.read_report(copy)


def test_without_a_report_an_adapter_is_still_refused(small: Path, tmp_path: Path) -> None:
    model, tokenizer = pocketllm.load(small, mode="packed")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "saved")
    pocketllm.load(tmp_path / "saved")
    (tmp_path / "saved" / "adapter_config.json").write_text("{}")
    with pytest.raises(FormatError, match="apply automatically"):
        pocketllm.load(tmp_path / "saved")


@pytest.fixture(scope="module")
def adapter(small: Path, text: Path) -> Path:
    from pocketllm.config import LoopConfig, LoraTuneConfig

    pytest.importorskip("peft")
    loop = LoopConfig(batch_size=2, eval_every=1)
    config = LoraTuneConfig(
        texts=(str(text),), rank=2, alpha=4, steps=1, validation_items=2, context=16, loop=loop
    )
    pocketllm.lora(small, small.parent / "adapter", config)
    return small.parent / "adapter"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"megatron_config": {"a": 1}, "megatron_core": "owned"}, "megatron_config: got .* wanted nothing"),
        ({"megatron_core": "owned"}, "megatron_core: got 'owned'"),
        ({"peft_type": "IA3"}, "peft_type: got 'IA3', wanted 'LORA'"),
        ({"auto_mapping": {"parent_library": "os"}}, "auto_mapping"),
        ({"r": 1 << 40}, "r: got .* wanted a rank of 1 to 2, as stored"),
        ({"rank_pattern": {"q_proj": 1 << 40}}, "rank_pattern"),
        ({"target_modules": "(a+)+$"}, "target_modules: got .* wanted a list of names"),
        ({"init_lora_weights": "eva"}, "init_lora_weights"),
        ({"bias": "all"}, "bias: got 'all', wanted 'none'"),
        ({"lora_alpha": "much"}, "lora_alpha: got 'much', wanted a number"),
        ({"use_dora": 1}, "use_dora: got .* wanted true or false"),
        ({"task_type": ["x"]}, "task_type: got .* wanted a name"),
        ({"layers_to_transform": ["0"]}, "layers_to_transform: got .* wanted numbers of blocks"),
        ({"invented": 1}, "invented: got '1', wanted nothing"),
    ],
)
def test_an_adapter_may_only_be_plain_lora(
    changes: dict[str, Any],
    words: str,
    adapter: Path,
    small: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PEFT imports the package that `megatron_core` names, from the current folder, too."""
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    (tmp_path / "owned.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    check_adapter(folder, small)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, **changes}))
    with pytest.raises(FormatError, match=rf"adapter_config\.json: {words}"):
        check_adapter(folder, small)
    assert "owned" not in sys.modules


def test_an_adapter_needs_a_rank(adapter: Path, small: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(adapter, tmp_path / "adapter"))
    settings = json.loads((folder / "adapter_config.json").read_text())
    del settings["r"]
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(FormatError, match="r: missing"):
        check_adapter(folder, small)


def test_what_transformers_cannot_build_is_an_error_of_ours(copy: Path) -> None:
    for changes in ({"model_type": "perceptron"}, {"hidden_size": "wide"}, {"num_attention_heads": 0}):
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, **changes}))
        sign(copy, lambda files: None, ["config.json"])
        with pytest.raises((LoadError, FormatError), match=str(copy)):
            pocketllm.load(copy)
        (copy / "config.json").write_text(json.dumps(config))


def test_a_tokenizer_that_cannot_be_used(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "dense")
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "model_max_length": {}}))
    with pytest.raises(PocketError, match="its tokenizer cannot be read"):
        pocketllm.source.need_tokenizer(folder)
