"""Files: what is written is what safetensors reads, and damage is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pocketllm
from pocketllm.errors import FormatError
from pocketllm.files import write_json
from pocketllm.format import checkpoint as ckpt, weight_files
from tests import tiny

TENSORS = {
    "a": torch.randn(3, 5),
    "b": torch.randn(7).bfloat16(),
    "c": torch.randint(0, 256, (11,), dtype=torch.uint8),
    "d": torch.randn(2, 2, 2).half(),
    "e": torch.randn(1).double(),
}
SIZES = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


@pytest.mark.parametrize("limit", [10**9, 64, 1])
def test_writing(limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_files, "SHARD_BYTES", limit)
    weight_files.write_safetensors(tmp_path, SIZES, iter(TENSORS.values()))
    assert {p.name: p.stat().st_size for p in tmp_path.iterdir()} == weight_files.safetensors_bytes(SIZES)
    read = {}
    for file in tmp_path.glob("*.safetensors"):
        read.update(load_file(file))
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)
    index = tmp_path / "model.safetensors.index.json"
    assert index.is_file() == (limit < 10**9)
    if index.is_file():
        placed = json.loads(index.read_text())["weight_map"]
        assert all(name in load_file(tmp_path / file) for name, file in placed.items())


def test_checksum_is_zlib_s() -> None:
    import zlib

    assert (
        ckpt.checksum(TENSORS["c"], TENSORS["b"])
        == f"{zlib.crc32(weight_files.tensor_bytes(TENSORS['b']), zlib.crc32(bytes(TENSORS['c'].tolist()))):08x}"
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    pocketllm.compress(tiny.save(folder / "dense"), tiny.settings(), folder / "out")
    return folder / "out"


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copy"))


def test_a_whole_model_passes(whole: Path) -> None:
    layout = ckpt.verify(whole)
    assert ckpt.Layout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout


def edit(path: Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


EMBEDDING = "model.embed_tokens.weight"


def hashed(layout: Any, entry: list[Any]) -> None:
    """Version 3, with such a codebook in the place of every other."""
    size, d, seed, window = entry
    books = [[size, d, seed, crc32, window] for *_, crc32 in layout["codebooks"]]
    layout.update(format_version=3, codebooks=books)


LAYOUT_DAMAGE: dict[str, Callable[[Any], Any]] = {
    "format_version is 99": lambda q: q.update(format_version=99),
    "unknown key 'rotation'": lambda q: q.update(rotation=1),
    "malformed": lambda q: q.pop("codebooks"),
    "malformed.*twist": lambda q: q["decoders"][0].update(twist=1),
    "malformed.*norm": lambda q: q["decoders"][0].update(norm="batch"),
    "malformed.*x: got 1 values, wanted 8": lambda q: q["matrices"].update(x=[1]),
    "does not exist": lambda q: q["matrices"][EMBEDDING].__setitem__(2, 77),
    "malformed.*codebook, decoder and stride": lambda q: q["matrices"][EMBEDDING].__setitem__(2, "0"),
    "malformed.*got -1": lambda q: q["matrices"][EMBEDDING].__setitem__(3, -1),
    "malformed.*shape": lambda q: q["matrices"][EMBEDDING].__setitem__(0, [96, 36.0]),
    "malformed.*rotation": lambda q: q["matrices"][EMBEDDING].__setitem__(6, [1 << 63, None]),
    "malformed.*strip_rows: got 0, wanted": lambda q: q["matrices"][EMBEDDING].__setitem__(5, 0),
    "malformed.*with transposed": lambda q: q["matrices"][EMBEDDING].__setitem__(0, [96]),
    "malformed.*seed": lambda q: q["codebooks"][0].__setitem__(2, 0.5),
    "malformed.*transposed: got 1, wanted true or false": lambda q: q["matrices"][EMBEDDING].__setitem__(
        1, 1
    ),
    "malformed.*row_scale: got 'true', wanted true": lambda q: q["decoders"][0].update(row_scale="true"),
    "malformed.*crc32: got 5, wanted": lambda q: q["matrices"][EMBEDDING].__setitem__(7, 5),
    "malformed.*crc32: got 'ABCDEF01', wanted": lambda q: q["codebooks"][0].__setitem__(3, "ABCDEF01"),
    "malformed.*crc32: got None, wanted": lambda q: q["decoders"][0].update(crc32=None),
    "malformed.*K: got 1048577, wanted": lambda q: q["codebooks"][0].__setitem__(0, (1 << 20) + 1),
    "malformed.*d: got 65, wanted": lambda q: q["codebooks"][0].__setitem__(1, 65),
    "malformed.*vector_len: got 65, wanted": lambda q: q["decoders"][0].update(vector_len=65),
    "malformed.*decoder.*True": lambda q: q["decoders"][0].update(hidden=True),
    "its codebook has vector_len 5, its decoder 4": lambda q: [d.update(vector_len=4) for d in q["decoders"]],
    "stride 6 does not fit a codebook of 32": lambda q: q["matrices"][EMBEDDING].__setitem__(4, 6),
    "malformed.*codebook: got 4 values, wanted 5": lambda q: q.update(format_version=3),
    "malformed.*codebook: got 5 values, wanted 4": lambda q: q["codebooks"][0].append(0),
    "malformed.*hashed codebook's window: got 8, wanted": lambda q: hashed(q, [256, 1, None, 8]),
    "malformed.*window: got 17, wanted": lambda q: hashed(q, [256, 1, None, 17]),
    "malformed.*window: got True, wanted": lambda q: hashed(q, [256, 1, None, True]),
    "malformed.*hashed codebook's K: got 32, wanted": lambda q: hashed(q, [32, 1, None, 9]),
    "malformed.*hashed codebook's d: got 5, wanted": lambda q: hashed(q, [256, 5, None, 9]),
    "malformed.*a hashed codebook has no seed": lambda q: hashed(q, [256, 1, 3, 9]),
    "its codebook is hashed, its decoder of form row": lambda q: [
        hashed(q, [256, 2, None, 9]),
        [d.update(vector_len=2, form="row") for d in q["decoders"]],
    ],
    "stride 0 and windows of 9 bits do not fit": lambda q: [
        hashed(q, [256, 2, None, 9]),
        [d.update(vector_len=2) for d in q["decoders"]],
    ],
    "not compressed by pocketllm": lambda q: q.update(quant_method="gptq"),
}


@pytest.mark.parametrize("words", LAYOUT_DAMAGE)
def test_damaged_layout(words: str, copy: Path) -> None:
    edit(copy / "config.json", lambda config: LAYOUT_DAMAGE[words](config["quantization_config"]))
    for read in (ckpt.read_layout, ckpt.verify, pocketllm.load):
        with pytest.raises(FormatError, match=words) as caught:
            read(copy)
        assert "config.json" in str(caught.value)


def test_config_missing_or_no_json(copy: Path) -> None:
    (copy / "config.json").write_text("{")
    with pytest.raises(FormatError, match=r"config\.json: damaged"):
        ckpt.read_layout(copy)
    (copy / "config.json").unlink()
    with pytest.raises(FormatError, match=r"no config\.json"):
        ckpt.read_layout(copy)


def test_report_missing_damaged_or_newer(copy: Path) -> None:
    report = copy / ckpt.REPORT_NAME
    edit(report, lambda value: value.update(format_version=4))
    with pytest.raises(FormatError, match="format_version is 4, this version reads 2 and 3"):
        ckpt.read_report(copy)
    report.write_text("[]")
    with pytest.raises(FormatError, match="damaged"):
        ckpt.read_report(copy)
    report.write_text("{")
    with pytest.raises(FormatError, match="damaged"):
        ckpt.read_report(copy)
    report.unlink()
    with pytest.raises(FormatError, match=r"no pocketllm\.json \(save_pretrained does not write one\)"):
        ckpt.read_report(copy)


REPORT_DAMAGE: dict[str, Callable[[Any], Any]] = {
    "no list of files": lambda r: r.update(files=[]),
    "files: malformed entry 'config.json'": lambda r: r["files"]["config.json"].pop("bytes"),
    "files: malformed entry '../x'": lambda r: r["files"].update({"../x": r["files"]["config.json"]}),
    "skipped: got None": lambda r: r.pop("skipped"),
    "bytes_on_disk: got 'many'": lambda r: r.update(bytes_on_disk="many"),
    r"matrices\[0\]\.nmse: got \[\]": lambda r: r["matrices"][0].update(nmse=[]),
    r"matrices\[2\]\.shape: got \[''\]": lambda r: r["matrices"][2].update(shape=[""]),
    r"matrices\[1\]\.name": lambda r: r["matrices"].__setitem__(1, 5),
    r"skipped\[0\]: wanted name and reason": lambda r: r["skipped"][0].pop("reason"),
    "bytes_by_part.indices": lambda r: r["bytes_by_part"].update(indices={}),
}


@pytest.mark.parametrize("words", REPORT_DAMAGE)
def test_damaged_report(words: str, copy: Path) -> None:
    edit(copy / ckpt.REPORT_NAME, REPORT_DAMAGE[words])
    with pytest.raises(FormatError, match=f"{ckpt.REPORT_NAME}: damaged .*{words}"):
        ckpt.read_report(copy)


def test_tensors_that_are_not_what_the_layout_says(copy: Path) -> None:
    """The weights are those of another model, and every checksum of the files has been made to fit."""
    path = copy / "model.safetensors"
    tensors = load_file(path)
    damage: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
        r"layers\.0\.mlp\.up_proj\.weight\.indices: stored as U8 \(10,\), wanted": lambda t: t.update(
            {"model.layers.0.mlp.up_proj.weight.indices": torch.zeros(10, dtype=torch.uint8)}
        ),
        r"codebooks\.0\.weight: stored as F32 \(32, 5\), wanted F16 \(32, 5\)": lambda t: t.update(
            {"pocketllm.codebooks.0.weight": t["pocketllm.codebooks.0.weight"].float()}
        ),
        r"no \*\.safetensors file contains pocketllm\.decoders\.0\.down": lambda t: t.pop(
            "pocketllm.decoders.0.down"
        ),
    }
    for words, change in damage.items():
        changed = dict(tensors)
        change(changed)
        save_file(changed, path, {"format": "pt"})
        facts = ckpt.file_facts(copy, [path.name])
        edit(copy / ckpt.REPORT_NAME, lambda report, facts=facts: report["files"].update(facts))
        for read in (ckpt.verify, pocketllm.load):
            with pytest.raises(FormatError, match=words):
                read(copy)


def test_tensors_that_nothing_has_a_use_for_are_left_unread(copy: Path) -> None:
    """As FORMAT.md says."""
    path = copy / "model.safetensors"
    more = {
        "unheard.of": torch.ones(1),
        "pocketllm.codebooks.99.weight": torch.ones(1),
        EMBEDDING: torch.ones(1),
    }
    expected = pocketllm.load(copy, mode="dense")[0].get_parameter(EMBEDDING)
    save_file({**load_file(path), **more}, path, {"format": "pt"})
    facts = ckpt.file_facts(copy, [path.name])
    edit(copy / ckpt.REPORT_NAME, lambda report: report["files"].update(facts))
    assert torch.equal(pocketllm.load(copy, mode="dense")[0].get_parameter(EMBEDDING), expected)


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def position(path: Path, name: str) -> int:
    """Where a tensor's data begins in a safetensors file."""
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    start: int = header[name]["data_offsets"][0]
    return 8 + length + start


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        ("model.layers.1.mlp.up_proj.weight.indices", r"layers\.1\.mlp\.up_proj\.weight: altered"),
        ("model.layers.0.mlp.up_proj.weight.row_scale", r"layers\.0\.mlp\.up_proj\.weight: altered"),
        ("pocketllm.codebooks.2.weight", r"model\.safetensors: pocketllm\.codebooks\.2: altered"),
        ("pocketllm.decoders.1.up", r"model\.safetensors: pocketllm\.decoders\.1: altered"),
        ("model.norm.weight", r"model\.safetensors: altered"),
    ],
)
def test_one_flipped_bit(tensor: str, words: str, copy: Path) -> None:
    path = copy / "model.safetensors"
    flip(path, position(path, tensor) + 1)
    with pytest.raises(FormatError, match=words):
        pocketllm.load(copy)


def test_an_altered_file_takes_precedence_over_what_it_causes(copy: Path) -> None:
    with pytest.raises(ValueError, match="of its own"), ckpt.verifying(copy):
        raise ValueError("of its own")
    path = copy / "model.safetensors"
    flip(path, position(path, "model.norm.weight"))
    with pytest.raises(FormatError, match=r"model\.safetensors: altered") as caught, ckpt.verifying(copy):
        raise ValueError("a consequence")
    assert str(caught.value.__cause__) == "a consequence"


def test_flipped_bit_in_the_tokenizer(copy: Path) -> None:
    flip(copy / "tokenizer.json", 100)
    with pytest.raises(FormatError, match=r"tokenizer\.json: altered"):
        pocketllm.load(copy)


def test_truncated_file(copy: Path) -> None:
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(FormatError, match=r"model\.safetensors: .*truncated"):
        pocketllm.load(copy)


def test_missing_files(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(FormatError, match=r"tokenizer\.json: missing"):
        ckpt.verify(copy)
    (copy / "model.safetensors").unlink()
    with pytest.raises(FormatError, match="safetensors"):
        ckpt.verify(copy)


def test_json_is_renamed_when_whole(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
