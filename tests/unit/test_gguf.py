"""Models in GGUF files: what is read, where it is kept, and how bad files are refused."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from copy import deepcopy
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import pocketllm
from pocketllm.errors import SourceError, WeightError
from pocketllm.source import gguf_conversion, gguf_model, need_tokenizer, resolve, resolve_local
from tests import gguf_files, tiny
from tests.commands import Run, kill_now, killed


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(gguf_model, "cache_folder", lambda: tmp_path / "cache")
    return tmp_path / "cache" / "gguf"


@pytest.fixture(scope="module")
def dense() -> Any:
    return gguf_files.model()


@pytest.fixture
def file(dense: Any, tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    return gguf_files.write(tmp_path / "model" / "tiny.gguf", dense)


def test_weights_and_tokenizer(file: Path, dense: Any) -> None:
    folder = resolve(str(file))
    stored = load_file(folder / "model.safetensors")
    assert set(stored) == set(dense.state_dict())
    for name, value in dense.state_dict().items():
        if value.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            value = torch.from_numpy(gguf.dequantize(gguf.quantize(value.numpy(), kind), kind))
        assert torch.equal(stored[name], value.bfloat16()), name
    assert need_tokenizer(folder)("ab a")["input_ids"] == [98, 96, gguf_files.TOKENS.index("a")]


@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_files_that_are_not_quantized_keep_their_dtype(
    kind: str, dtype: torch.dtype, dense: Any, tmp_path: Path
) -> None:
    folder = resolve(str(gguf_files.write(tmp_path / "tiny.gguf", dense, kind)))
    stored = load_file(folder / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], dense.lm_head.weight.detach().to(dtype))


def test_it_is_read_once(file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    folder = resolve(str(file), messages.append)
    assert messages == ["reading tiny.gguf"]
    monkeypatch.setattr(gguf_conversion, "convert", lambda *arguments: pytest.fail("converted again"))
    assert folder == resolve(str(file.parent)) == resolve_local(str(file))
    assert list(cache.iterdir()) == [folder]


def test_a_damaged_folder_is_made_again(file: Path) -> None:
    folder = resolve(str(file))
    (folder / "model.safetensors").write_bytes(b"x")
    assert resolve(str(file)) == folder
    assert load_file(folder / "model.safetensors")


def test_the_report_names_the_quantization(file: Path, tmp_path: Path, run: Run) -> None:
    config = tiny.settings()
    planned = pocketllm.dry_run(file, config)
    report = pocketllm.compress(file, config, tmp_path / "out")
    assert report.bytes_on_disk == planned.bytes_on_disk
    stored = json.loads((tmp_path / "out" / "pocketllm.json").read_text())
    assert stored["gguf"] == {"file": "tiny.gguf", "name": "Q8_0", "tensors": {"F32": 5, "Q8_0": 16}}
    assert not (tmp_path / "out" / gguf_conversion.NOTE_NAME).exists()
    _, shown, _ = run("info", str(tmp_path / "out"))
    assert "Q8_0 weights of tiny.gguf, dequantized" in shown
    model, _ = pocketllm.load(tmp_path / "out")
    assert model(torch.arange(5)[None]).logits.isfinite().all()


def test_other_models_have_no_such_note(source: Path, small: Path) -> None:
    assert "gguf" not in json.loads((small / "pocketllm.json").read_text())


def test_safetensors_in_the_same_folder_come_first(file: Path, source: Path) -> None:
    (file.parent / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    assert resolve(str(file.parent)) == file.parent
    assert resolve(str(file)) != file.parent


def test_several_files(file: Path) -> None:
    file.with_name("other.gguf").write_bytes(b"")
    with pytest.raises(SourceError, match=r"several GGUF files \(other.gguf, tiny.gguf\); name the one"):
        resolve(str(file.parent))


def test_another_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"a file; wanted a model folder .* or a file \*.gguf"):
        resolve(str(tmp_path / "model.onnx"))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.06, 0.5, 0.99])
def test_truncated(share: float, file: Path, cache: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(SourceError, match=r"tiny.gguf: not a readable GGUF file .* truncated or damaged"):
        resolve(str(file))
    assert not any(cache.iterdir())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "rwkv6"}, "type 'rwkv6' cannot be read by transformers .*original checkpoint"),
        (
            {"without": "blk.1.ffn_up.weight"},
            r"no tensor for model.layers.1.mlp.up_proj.weight \(1 param.* incomplete",
        ),
        (
            {"added": {"blk.0.attn_q.bias": np.ones(64, dtype=np.float32)}},
            "holds 74,496 values, and LlamaForCausalLM has parameters for 74,432: .* would ignore the others",
        ),
        ({"tokenizer": False}, "its tokenizer cannot be rebuilt .* put the model's tokenizer.json and"),
        ({"shards": 3}, "one of 3 shards; merge them"),
        ({"blocks": 10**6}, "num_hidden_layers is 1000000, the files hold 21 tensors"),
        ({"width": 128}, r"lm_head.weight has the shape \[99, 64\], wanted \[99, 128\]\).*original check"),
    ],
)
def test_files_that_cannot_be_read(
    changes: dict[str, Any], message: str, dense: Any, tmp_path: Path, cache: Path
) -> None:
    file = gguf_files.write(tmp_path / "tiny.gguf", dense, **changes)
    with pytest.raises(SourceError, match=message):
        resolve(str(file))
    assert not any(cache.iterdir())


def test_values_that_are_not_finite(dense: Any, tmp_path: Path, cache: Path) -> None:
    broken = deepcopy(dense)
    broken.model.norm.weight.data[3] = torch.nan
    file = gguf_files.write(tmp_path / "tiny.gguf", broken)
    with pytest.raises(WeightError, match=f"^{file}: model.norm.weight: 1 of 64 values are NaN or Inf"):
        resolve(str(file))
    assert not any(cache.iterdir())


def test_errors_name_the_file_and_no_temporary_one(dense: Any, tmp_path: Path, cache: Path) -> None:
    file = gguf_files.write(tmp_path / "tiny.gguf", dense, tokenizer=False)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SourceError, match=r"; fetch tokenizer.json next to the file again$") as raised:
        resolve(str(file))
    assert str(raised.value).startswith(f"{file}: its tokenizer cannot be read (")
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(SourceError, match="cannot be rebuilt") as raised:
        resolve(str(file))
    assert str(cache) not in str(raised.value)


def test_a_missing_file(tmp_path: Path) -> None:
    for name in (str(tmp_path / "x.gguf"), "owner/x.GGUF"):
        with pytest.raises(SourceError, match=f"^{name}: no such file; check the path of the GGUF file"):
            resolve(name)


@pytest.mark.parametrize("what", ["the file", "its header", "the folder"])
def test_no_permission_to_read(what: str, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    place, name = {
        "the file": (gguf_model, "sha256_file"),
        "its header": (gguf, "GGUFReader"),
        "the folder": (os, "listdir"),
    }[what]
    monkeypatch.setattr(place, name, refuse)
    given = file.parent if what == "the folder" else file
    with pytest.raises(
        SourceError, match=rf"^{given}: cannot be read \(Permission denied\); check its permissions"
    ):
        resolve(str(given))


def test_what_a_killed_conversion_leaves_is_removed(
    file: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert = gguf_conversion.convert

    def convert_half(gguf: Path, folder: Path, *options: Any) -> None:
        convert(gguf, folder, *options)
        kill_now()

    with monkeypatch.context() as patched:
        patched.setattr(gguf_conversion, "convert", convert_half)
        killed(lambda: resolve(str(file)))
    (left,) = cache.iterdir()
    assert left.name.startswith(".tiny-") and (left / "model" / "config.json").is_file()
    alive, foreign = left.with_name(f"{left.name[:-4]}live"), cache / ".other"
    for folder in (alive, foreign):
        folder.mkdir()
    (foreign / "lock").touch()
    (foreign / "pocketllm-lock").touch()
    with (alive / "pocketllm-lock").open("wb") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        folder = resolve(str(file))
        assert set(cache.iterdir()) == {folder, alive, foreign}


def test_the_command_line_refuses_and_writes_nothing(file: Path, tmp_path: Path, run: Run) -> None:
    file.write_bytes(file.read_bytes()[:-1000])
    code, _, err = run("compress", str(file), "-o", str(tmp_path / "out"), "--no-calibration")
    assert code == 1 and "truncated or damaged" in err
    assert {path.name for path in tmp_path.iterdir()} == {"model", "cache"}


def test_a_tokenizer_next_to_the_file_is_used(dense: Any, tmp_path: Path, cache: Path) -> None:
    file = gguf_files.write(tmp_path / "tiny.gguf", dense, tokenizer=False)
    tiny.tokenizer().save_pretrained(tmp_path)
    folder = resolve(str(file))
    assert need_tokenizer(folder)("a")["input_ids"] == tiny.tokenizer()("a")["input_ids"]
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(SourceError, match="its tokenizer cannot be read"):
        resolve(str(file))
    assert list(cache.iterdir()) == [folder]


def test_a_chat_template_next_to_the_file_completes_its_tokenizer(
    file: Path, dense: Any, tmp_path: Path, cache: Path
) -> None:
    alone = need_tokenizer(resolve(str(file)))
    template = "{% for turn in messages %}{{ turn.content }}!{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    other = gguf_files.write(tmp_path / "tiny.gguf", dense)
    tokenizer = need_tokenizer(resolve(str(other)))
    assert tokenizer.chat_template == template
    assert tokenizer("ab")["input_ids"] == alone("ab")["input_ids"]


def test_damaged_note(file: Path) -> None:
    folder = resolve(str(file))
    (folder / gguf_conversion.NOTE_NAME).write_text("[")
    with pytest.raises(SourceError, match=r"pocketllm_gguf.json: damaged .* delete the folder"):
        gguf_model.read_note(folder)


def test_a_file_type_that_is_not_known(dense: Any, tmp_path: Path) -> None:
    """The type of most weights names the quantization then."""
    folder = resolve(str(gguf_files.write(tmp_path / "tiny.gguf", dense, file_type=999)))
    assert gguf_model.read_note(folder) == {
        "file": "tiny.gguf",
        "name": "Q8_0",
        "tensors": {"F32": 5, "Q8_0": 16},
    }


def test_a_system_without_links(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError("not allowed")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    assert (resolve(str(file)) / "model.safetensors").is_file()


def test_cache_that_cannot_be_written(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "taken").write_text("")
    monkeypatch.setattr(gguf_model, "cache_folder", lambda: tmp_path / "taken" / "cache")
    with pytest.raises(SourceError, match=r"POCKETLLM_CACHE at a folder with 64 MB to spare"):
        resolve(str(file))


@pytest.mark.parametrize(("kind", "nbytes"), [("Q2_K", 2), ("Q8_0", 2), ("F16", 2), ("F32", 4)])
def test_the_disk_space_that_is_named(kind: str, nbytes: int, tmp_path: Path) -> None:
    """It is that of the dequantized model, however small the file is."""
    path = tmp_path / "x.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    quantization = gguf.GGMLQuantizationType[kind]
    block, size = gguf.GGML_QUANT_SIZES[quantization]
    for name in "ab":
        content = np.zeros((512, 1024 // block * size), dtype=np.uint8)
        writer.add_tensor(name, content, raw_dtype=quantization)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert gguf_conversion.needed_bytes(path) == nbytes * 2 * 512 * 1024 + 64_000_000
