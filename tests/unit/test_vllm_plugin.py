"""What the plug-in for vLLM does that needs no vLLM; tests/vllm has the rest."""

from __future__ import annotations

import importlib.metadata
import logging
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import pocketllm
from pocketllm.errors import FormatError, LoadError
from pocketllm.format.checkpoint import read_layout
from pocketllm.integrations.vllm_parts import Parts, carrier, embedding_of, parts_of
from pocketllm.integrations.vllm_plugin import register
from pocketllm.integrations.vllm_weights import DenseStream
from pocketllm.runtime.decode import Matrices
from pocketllm.runtime.export import export
from tests import tiny
from tests.packed_weights import FLOAT32, needs_compiler, relative

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
ATTENTION = "model.layers.0.self_attn"


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "mixtral", "qwen3_moe"])
def test_the_stream_is_the_decoded_checkpoint(tmp_path: Path, architecture: str) -> None:
    """Under its original names: experts apart, projections of Mixtral as w1, w2 and w3."""
    source = tiny.save(tmp_path / "source", architecture, num_hidden_layers=1)
    pocketllm.compress(source, tiny.settings(), tmp_path / "small")
    export(tmp_path / "small", tmp_path / "dense", torch.float32)
    wanted = load_file(tmp_path / "dense" / "model.safetensors")
    found = dict(DenseStream.open(tmp_path / "small", torch.float32).tensors())
    assert found.keys() == wanted.keys()
    assert [name for name, value in wanted.items() if not torch.equal(found[name], value)] == []


def test_the_stream_decodes_to_the_dtype_of_the_engine(small: Path) -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = dict(DenseStream.open(small, torch.bfloat16).tensors())
    finally:
        torch.set_default_dtype(torch.float32)
    model = pocketllm.load(small, mode="dense", dtype=torch.bfloat16)[0]
    name = f"{ATTENTION}.q_proj.weight"
    assert torch.equal(found[name], model.get_parameter(name))


def test_only_what_is_asked_for_is_read(small: Path) -> None:
    stream = DenseStream.open(small, torch.float32)
    found = dict(stream.tensors(is_read=lambda name: "layers.1." in name))
    assert found and all(name.startswith("model.layers.1.") for name in found)


def test_a_damaged_folder_has_no_stream(copy: Path) -> None:
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(FormatError, match="altered"):
        DenseStream.open(copy, torch.float32)


def test_parts_of_fused_layers(small: Path) -> None:
    layout = read_layout(small)
    assert parts_of(layout, f"{ATTENTION}.qkv_proj", FUSED) == tuple(
        f"{ATTENTION}.{part}_proj.weight" for part in "qkv"
    )
    assert parts_of(layout, f"{ATTENTION}.o_proj", FUSED) == (f"{ATTENTION}.o_proj.weight",)
    assert parts_of(layout, "model.layers.0.router", FUSED) == ()
    name = f"{ATTENTION}.k_proj.weight"
    partly = replace(layout, matrices={n: e for n, e in layout.matrices.items() if n != name})
    assert parts_of(partly, f"{ATTENTION}.qkv_proj", FUSED) == ()
    turned = {**layout.matrices, name: replace(layout.matrices[name], transposed=True)}
    assert parts_of(replace(layout, matrices=turned), f"{ATTENTION}.qkv_proj", FUSED) == ()


def test_the_embedding_is_found_by_its_shape(small: Path) -> None:
    layout = read_layout(small)
    name, head = "model.embed_tokens.weight", "lm_head.weight"
    entry = layout.matrices[name]
    assert len(entry.shape) == 2
    shape = entry.shape[0], entry.shape[1]
    assert embedding_of(layout, shape, ()) == (name,)
    assert embedding_of(layout, (1, 1), ()) == ()
    both = replace(layout, matrices={**layout.matrices, head: entry})
    assert embedding_of(both, shape, ()) == () and embedding_of(both, shape, (head,)) == (name,)
    turned = {name: replace(entry, rotation=(1, 2))}  # its rows cannot be decoded one by one
    assert embedding_of(replace(layout, matrices=turned), shape, ()) == ()


@needs_compiler
def test_products_with_the_parts_of_a_fused_layer(tmp_path: Path) -> None:
    """Parts of other codebooks, bits and rotations, in whatever order they come."""
    pocketllm.compress(tiny.save(tmp_path / "source"), tiny.on_trellis(6.0), tmp_path / "small")
    matrices = Matrices.open(tmp_path / "small")
    names = [f"{ATTENTION}.{part}_proj.weight" for part in "qkv"]
    parts = Parts("qkv")
    for shard in "vqk":
        packed = matrices.packed(f"{ATTENTION}.{shard}_proj.weight", torch.float32)
        parts.take(torch.empty(0), carrier(packed), shard)
    joined = torch.cat([matrices.read(name) for name in names])
    parts.complete(len(joined))
    x, bias = torch.randn(3, 36), torch.randn(len(joined))
    assert relative(parts.linear(x, bias), x @ joined.T + bias) < FLOAT32
    assert relative(parts.linear(x, None), x @ joined.T) < FLOAT32
    alone = Parts("embedding")
    tensor: Any = carrier(matrices.packed("model.embed_tokens.weight", torch.float32))
    tensor.shard_id = 0
    alone.take(torch.empty(0), tensor)
    alone.complete(96)
    rows = matrices.read("model.embed_tokens.weight")
    assert relative(alone.look_up(torch.tensor([5, 0]), torch.float32), rows[[5, 0]]) < FLOAT32
    assert relative(alone.linear(x, None), x @ rows.T) < FLOAT32


def test_a_layer_that_does_not_get_its_parts(small: Path, tmp_path: Path) -> None:
    parts = Parts("qkv_proj")
    with pytest.raises(LoadError, match=r"qkv_proj: got a tensor \(2, 2\) of torch.float32, wanted a packed"):
        parts.take(torch.empty(0), torch.ones(2, 2))
    matrices = Matrices.open(small)
    parts.take(torch.empty(0), carrier(matrices.packed(f"{ATTENTION}.q_proj.weight", torch.float32)), "q")
    with pytest.raises(LoadError, match="got 1 packed matrices of 36 rows, wanted 72 rows"):
        parts.complete(72)


def test_a_part_without_a_kernel(tmp_path: Path) -> None:
    """Row statistics: the published form of the decoder."""
    source = tiny.save(tmp_path / "source", num_hidden_layers=1)
    settings = tiny.settings(codec={"decoder": "row"})
    pocketllm.compress(source, settings, tmp_path / "small")
    matrices, name = Matrices.open(tmp_path / "small"), f"{ATTENTION}.q_proj.weight"
    assert parts_of(matrices.layout, f"{ATTENTION}.q_proj", {}) == ()
    parts = Parts("q_proj")
    parts.take(torch.empty(0), carrier(matrices.packed(name, torch.float32)))
    with pytest.raises(LoadError, match="q_proj: has no kernel"):
        parts.complete(36)


def test_the_entry_point() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))[
        "project"
    ]
    ((name, value),) = project["entry-points"]["vllm.general_plugins"].items()
    assert importlib.metadata.EntryPoint(name, value, "vllm.general_plugins").load() is register


def test_a_plug_in_that_fails_raises_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delitem(sys.modules, "pocketllm.integrations.vllm_quantization", raising=False)
    monkeypatch.setitem(sys.modules, "vllm", None)  # as if it were not installed
    with caplog.at_level(logging.WARNING):
        register()
    assert "vLLM cannot load models compressed by pocketllm: ModuleNotFoundError" in caplog.text
