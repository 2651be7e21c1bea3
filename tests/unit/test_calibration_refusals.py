"""Models whose blocks run but whose head cannot be reached, and blocks that autocast does not suit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, BertGenerationConfig, ZambaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import pocketllm
from pocketllm.calibrate.blocks import BlockStream, check_blocks
from pocketllm.calibrate.embedding_cost import EndCosts
from pocketllm.calibrate.gradients import Head
from pocketllm.errors import ConfigError
from pocketllm.plan.matrices import Matrix
from pocketllm.runtime.layers import packed_matrices
from pocketllm.source.dense_checkpoint import open_dense
from pocketllm.source.folder import load_dense
from tests import tiny

WINDOWS = torch.arange(3, 35)[None]
_SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def stored(folder: Path, config: object) -> Path:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_layers_between_blocks_and_head(tmp_path: Path) -> None:
    folder = stored(tmp_path, BertConfig(**_SIZES, vocab_size=96, is_decoder=True))
    with pytest.raises(ConfigError, match="BertLMHeadModel has layers between its blocks and its head"):
        check_blocks(open_dense(folder), WINDOWS)


def test_a_bias_of_the_head_that_is_stored_under_another_name(tmp_path: Path) -> None:
    source = open_dense(stored(tmp_path, BertGenerationConfig(**_SIZES, vocab_size=96, is_decoder=True)))
    check_blocks(source, WINDOWS)
    stream = BlockStream(source, WINDOWS, batch=1)
    Head(stream, 0)
    assert not any(p.is_meta for p in stream.model.get_output_embeddings().parameters())


def test_a_block_that_autocast_does_not_suit_runs_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = BlockStream(open_dense(tiny.save(tmp_path / "dense")), WINDOWS)
    calls: list[bool] = []

    def block(hidden: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        calls.append(stream.in_float32)
        if not stream.in_float32:
            raise RuntimeError(
                "index_add_(): self (Float) and source (BFloat16) must have the same scalar type"
            )
        return hidden

    with stream.loaded(0):
        assert torch.equal(stream.call(block, stream.hidden[0], 0), stream.hidden[0])
    assert calls == [False, True]

    def broken(hidden: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        raise RuntimeError("out of memory")

    stream.in_float32 = False
    with pytest.raises(RuntimeError, match="out of memory"), stream.loaded(0):
        stream.call(broken, stream.hidden[0], 0)


def test_outputs_without_gradient_are_left_out(tmp_path: Path) -> None:
    """Indexers of sparse attention compute without gradients; their outputs have no Hessian."""
    from pocketllm.calibrate.gradients import block_backward
    from pocketllm.plan.selection import classify

    source = open_dense(tiny.save(tmp_path / "dense"))
    stream = BlockStream(source, WINDOWS, batch=1)
    matrices = [m for m in classify(source, tiny.on_trellis())[0] if ".layers.0." in m.name]
    with stream.loaded(0) as (_, block):
        layer = block.self_attn.k_proj
        forward = layer.forward
        layer.forward = lambda x: forward(x).detach()
        _, after = block_backward(stream, block, matrices, [torch.randn_like(stream.hidden[0])])
    names = {name.split(".layers.0.")[1] for name in after.squares}
    assert "self_attn.k_proj.weight" not in names and "self_attn.q_proj.weight" in names


def test_a_model_that_runs_without_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_dense(tiny.save(tmp_path / "dense"))
    monkeypatch.setattr(LlamaRMSNorm, "forward", lambda self, hidden: hidden.detach())
    with pytest.raises(ConfigError, match="LlamaForCausalLM runs its blocks without gradients"):
        check_blocks(source, WINDOWS)


def test_an_embedding_with_more_rows_than_the_head(tmp_path: Path) -> None:
    """As Moshi has: a token that is never predicted."""
    source = open_dense(tiny.save(tmp_path / "dense", "qwen3"))
    stream = BlockStream(source, WINDOWS, batch=1)
    ends = EndCosts(torch.ones(96), torch.ones(97))
    embedding = Matrix("model.embed_tokens.weight", (97, 36), 97, 36, "embed", False)
    costs, rows, share = ends.of(stream, embedding)
    assert costs.shape == rows.shape == (97,) and share == 0.0
    costs, rows, share = ends.of(stream, Matrix("lm_head.weight", (96, 36), 96, 36, "head", False))
    assert costs.shape == rows.shape == (96,) and share == 1.0


def _zamba(folder: Path) -> Path:
    config = ZambaConfig(
        vocab_size=96,
        hidden_size=32,
        attention_hidden_size=64,
        attention_head_dim=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        mamba_dt_rank=4,
        mamba_d_state=4,
        layers_block_type=["linear_attention", "hybrid"] * 2,
        pad_token_id=1,
    )
    return stored(folder, config)


def test_blocks_that_share_weights(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ZambaForCausalLM has blocks that share weights"):
        check_blocks(open_dense(_zamba(tmp_path)), WINDOWS)


def test_a_model_with_an_attribute_named_as_its_ties_loads(tmp_path: Path) -> None:
    """Zamba keeps `_tied_weights_keys` in the instance; its shared blocks are stored once and decode the same."""
    folder = _zamba(tmp_path / "dense")
    pocketllm.compress(folder, tiny.settings(codebook_scope="model"), tmp_path / "out")
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    dense = load_dense(folder, torch.float32)
    with torch.no_grad():
        for name, matrix in packed_matrices(packed).items():
            dense.get_parameter(name).copy_(matrix())
        wanted, got = (model(WINDOWS, use_cache=False).logits for model in (dense, packed))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4)
