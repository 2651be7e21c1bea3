"""Hessians against float64 oracles; what a block is called with against the model itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pocketllm.calibrate import autocast as compute
from pocketllm.calibrate.blocks import BlockStream, block_list
from pocketllm.calibrate.input_hessians import Collector, Inputs, regularized_hessian
from pocketllm.codec.kernels.select import add_square
from pocketllm.config import CompressConfig
from pocketllm.errors import ConfigError
from pocketllm.plan.matrices import Matrix
from pocketllm.plan.selection import classify
from pocketllm.source.dense_checkpoint import DenseCheckpoint, open_dense
from tests import tiny


@pytest.fixture(autouse=True)
def _float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks compute in float32, so that tolerances can be tight."""
    monkeypatch.setattr(compute, "fast_dtype", lambda device: torch.float32)


def tokens(windows: int = 6, context: int = 32) -> Tensor:
    return torch.randint(3, 96, (windows, context), generator=torch.Generator().manual_seed(5))


def opened(folder: Path, architecture: str, **changes: Any) -> tuple[DenseCheckpoint, Any]:
    """The checkpoint, and the model in float64 whose experts run one by one."""
    tiny.save(folder, architecture, **changes)
    reference = tiny.model(architecture, **changes).double()
    reference.set_experts_implementation("eager")
    return open_dense(folder), reference


def seen(source: DenseCheckpoint, windows: Tensor) -> Inputs:
    """The inputs of all blocks of the dense model."""
    matrices = [m for m in classify(source, CompressConfig())[0] if m.in_blocks]
    stream = BlockStream(source, windows, batch=4)
    parts = []
    for path, block in stream:
        parts.append(stream.inputs(block, [m for m in matrices if m.name.startswith(f"{path}.")]))
        stream.hidden = stream.run(block, stream.hidden)
    return Inputs(
        {name: h for part in parts for name, h in part.hessians.items()},
        {name: n for part in parts for name, n in part.tokens.items()},
        {name: n for part in parts for name, n in part.unseen_experts.items()},
    )


def close(found: Tensor, wanted: Tensor) -> bool:
    """Equal but for float32 rounding, on the scale of the whole matrix."""
    assert found.dtype == torch.float32 and wanted.dtype == torch.float64
    return float((found.double() - wanted).norm() / wanted.norm()) < 1e-5


@torch.no_grad()
def oracle(model: Any, windows: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(E[x x^T] of every linear layer, [tokens, columns] inputs of fused experts by parameter and expert)."""
    inputs: dict[str, list[Tensor]] = {}
    experts: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, args: inputs.setdefault(name, []).append(args[0].reshape(-1, args[0].shape[-1]))

    def route(name: str) -> Any:
        def hook(module: Any, args: tuple[Tensor, Tensor, Tensor]) -> None:
            hidden, chosen, _ = args
            for number in range(module.num_experts):
                x = hidden[(chosen == number).any(dim=1)]
                gate, up = (x @ module.gate_up_proj[number].T).chunk(2, dim=-1)
                experts[f"{name}.gate_up_proj|{number}"] = x
                experts[f"{name}.down_proj|{number}"] = module.act_fn(gate) * up

        return hook

    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D":
            module.register_forward_pre_hook(keep(f"{name}.weight"))
        elif hasattr(module, "gate_up_proj") and module.gate_up_proj.ndim == 3:
            module.register_forward_pre_hook(route(name))
    model(windows, use_cache=False)
    sums = {name: torch.cat(parts) for name, parts in inputs.items()}
    return {name: x.T @ x / len(x) for name, x in sums.items()}, experts


@pytest.mark.parametrize("architecture", [*tiny.ARCHITECTURES, *tiny.MIXED])
def test_hessians_are_those_of_the_model_in_float64(architecture: str, tmp_path: Path) -> None:
    source, reference = opened(tmp_path / "dense", architecture)
    found = seen(source, tokens())
    wanted, experts = oracle(reference, tokens())
    fused = {name.split("|")[0] for name in experts}
    assert set(found.hessians) <= {*wanted, *fused}
    for name, hessian in found.hessians.items():
        if name in fused:
            x = torch.cat([part for key, part in experts.items() if key.startswith(f"{name}|")])
            assert found.tokens[name] == len(x) == 2 * tokens().numel() and found.unseen_experts[name] == 0
            assert close(hessian, x.T @ x / len(x)), name
        else:
            assert found.tokens[name] == tokens().numel()
            assert close(hessian, wanted[name]), name


@pytest.mark.parametrize("architecture", [*tiny.ARCHITECTURES, *tiny.MIXED])
def test_blocks_are_called_as_the_model_calls_them(architecture: str, tmp_path: Path) -> None:
    """Windows of 32 tokens, sliding ones of 8: a block with the mask of another kind would be off by far."""
    source, reference = opened(tmp_path / "dense", architecture)
    stream = BlockStream(source, tokens(), batch=1)
    with torch.no_grad():
        for _, block in stream:
            stream.hidden = stream.run(block, stream.hidden)
        found = torch.cat([stream.after_blocks(hidden) for hidden in stream.hidden])
        wanted = reference.base_model(tokens(), use_cache=False).last_hidden_state
    assert torch.allclose(found.double(), wanted, atol=1e-4)
    assert all(p.is_meta for block in stream.blocks for p in block.parameters())


def test_kinds_of_blocks_have_arguments_of_their_own(tmp_path: Path) -> None:
    source, _ = opened(tmp_path / "dense", "gemma3")
    stream = BlockStream(source, tokens(), batch=2)
    sliding, full = (calls[0][1]["position_embeddings"][0] for calls in stream.calls)
    assert not torch.equal(sliding, full)


def test_blocks_that_return_tuples(tmp_path: Path) -> None:
    import transformers as t

    config = t.BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=96)
    model = t.AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "dense")
    stream = BlockStream(open_dense(tmp_path / "dense"), tokens(), batch=1)
    assert stream.as_tuple
    with torch.no_grad():
        for _, block in stream:
            stream.hidden = stream.run(block, stream.hidden)
        found = torch.cat([stream.after_blocks(hidden) for hidden in stream.hidden])
        wanted = model.transformer(tokens(), use_cache=False).last_hidden_state
    assert torch.allclose(found.reshape(wanted.shape), wanted, atol=1e-5)


def test_models_whose_blocks_cannot_be_run_one_by_one(tmp_path: Path) -> None:
    import transformers as t

    with pytest.raises(ConfigError, match="has no single list of blocks"):
        block_list(nn.Linear(2, 2))
    config = t.Gemma3nTextConfig(
        hidden_size=36,
        head_dim=18,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        vocab_size=96,
        vocab_size_per_layer_input=96,
        hidden_size_per_layer_input=8,
        laurel_rank=4,
        num_kv_shared_layers=0,
        layer_types=["sliding_attention", "full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 4,
    )
    t.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    with pytest.raises(ConfigError, match="do not form a simple chain"):
        BlockStream(open_dense(tmp_path / "dense"), tokens())


def test_sums_keep_their_precision() -> None:
    """65,536 inputs with a large mean, as activations have it, against float64."""
    total, exact = torch.zeros(24, 24), torch.zeros(24, 24, dtype=torch.float64)
    for _ in range(64):
        x = torch.randn(1024, 24) + torch.linspace(-30, 30, 24)
        add_square(total, x)
        exact += x.double().T @ x.double()
    assert float((total.double() - exact).abs().max() / exact.abs().max()) < 1e-6


def test_few_tokens_are_filled_up() -> None:
    x = torch.randn(3, 8)
    total = x.T @ x
    assert torch.equal(regularized_hessian(total, 8), total / 8)
    alike = torch.eye(8) * total.diagonal().mean() / 3
    assert torch.allclose(regularized_hessian(total, 3), (total + 5 * alike) / 8)
    assert torch.allclose(regularized_hessian(total, 3).diagonal().mean(), alike.diagonal().mean())
    other = torch.full((8, 8), 2.0)
    assert torch.allclose(regularized_hessian(total, 3, other), (total + 5 * other) / 8)
    assert torch.equal(regularized_hessian(torch.zeros(8, 8), 0), torch.eye(8))
    assert torch.equal(regularized_hessian(torch.zeros(8, 8), 0, other), other)


def test_layers_called_by_keyword() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(input=x)

    model, x = Named(), torch.randn(22, 6)
    collector = Collector(model, [Matrix("layer.weight", (4, 6), 4, 6, "layer", True)])
    with collector.watching(), collector.batch({}):
        model(x)
    assert torch.allclose(collector.inputs("cpu").hessians["layer.weight"], x.T @ x / 22, atol=1e-6)


class Experts(nn.Module):
    """Experts of their own modules, as some models outside transformers have them."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(6, 4, bias=False) for _ in range(4))
        self.other = nn.Linear(6, 4, bias=False)

    def forward(self, x: Tensor) -> None:
        for expert, part in zip(self.experts, (x[:20], x[20:22], x[:0], None), strict=True):
            if part is not None:
                expert(part)


def test_experts_that_see_few_tokens_or_none_take_the_mean_of_their_siblings() -> None:
    model, x = Experts(), torch.randn(22, 6)
    names = [f"experts.{n}.weight" for n in range(4)]
    matrices = [Matrix(name, (4, 6), 4, 6, "experts.*", True) for name in names]
    matrices.append(Matrix("other.weight", (4, 6), 4, 6, "other", True))
    collector = Collector(model, matrices)
    with collector.watching(), collector.batch({}):
        model(x)
    found = collector.inputs("cpu")
    siblings = x.T @ x / 22
    first, second, third, fourth = (found.hessians[name] for name in names)
    assert [found.tokens[name] for name in names] == [20, 2, 0, 0]
    assert torch.allclose(first, x[:20].T @ x[:20] / 20, atol=1e-6)
    assert torch.allclose(second, (x[20:].T @ x[20:] + 4 * siblings) / 6, atol=1e-6)
    assert torch.allclose(third, siblings, atol=1e-6) and torch.allclose(fourth, siblings, atol=1e-6)
    assert torch.equal(found.hessians["other.weight"], torch.eye(6)) and found.tokens["other.weight"] == 0


def shun_expert(model: Any, number: int) -> None:
    """Let the router send no token to an expert: the first component of its input is large and positive."""
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] += 100
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight[0] = 1.0
            layer.mlp.gate.weight[number] = 0
            layer.mlp.gate.weight[number, 0] = -100


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_fused_experts_that_see_no_token(architecture: str, tmp_path: Path) -> None:
    model = tiny.model(architecture)
    shun_expert(model, 1)
    model.save_pretrained(tmp_path / "dense")
    found = seen(open_dense(tmp_path / "dense"), tokens())
    assert set(found.unseen_experts.values()) == {1} and len(found.unseen_experts) == 4
    model = model.double()
    model.set_experts_implementation("eager")
    _, experts = oracle(model, tokens())
    for name in found.unseen_experts:
        assert not len(experts[f"{name}|1"])
        x = torch.cat([experts[f"{name}|{number}"] for number in (0, 2)])
        assert close(found.hessians[name], x.T @ x / len(x))


def test_inputs_survive_a_file(tmp_path: Path) -> None:
    shared, own = torch.randn(3, 3), torch.randn(2, 2)
    made = Inputs({"q": shared, "k": shared, "o": own}, {"q": 9, "k": 9, "o": 9}, {"o": 2})
    made.save(tmp_path / "inputs.safetensors")
    read = Inputs.load(tmp_path / "inputs.safetensors", "cpu")
    assert read.hessians["q"] is read.hessians["k"] and torch.equal(read.hessians["q"], shared)
    assert torch.equal(read.hessians["o"], own)
    assert (read.tokens, read.unseen_experts) == (made.tokens, made.unseen_experts)
    assert [path.name for path in tmp_path.iterdir()] == ["inputs.safetensors"]
    assert (tmp_path / "inputs.safetensors").stat().st_size < 4 * (9 + 4) + 500


def test_autocast_changes_little(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 has 8 bits: Hessians from it are those of float32 within a few parts in a hundred."""
    source, _ = opened(tmp_path / "dense", "llama")
    exact = seen(source, tokens())
    monkeypatch.setattr(compute, "fast_dtype", lambda device: torch.bfloat16)
    rounded = seen(source, tokens())
    for name, hessian in exact.hessians.items():
        assert float((rounded.hessians[name] - hessian).norm() / hessian.norm()) < 0.03
        assert rounded.hessians[name].dtype == torch.float32


def test_a_plain_function_may_stand_for_a_block(tmp_path: Path) -> None:
    source, _ = opened(tmp_path / "dense", "llama")
    stream = BlockStream(source, tokens(), batch=2)
    with stream.loaded(0):
        doubled = stream.call(lambda hidden, *args, **kwargs: (2 * hidden,), stream.hidden[1], 1)
    assert torch.equal(doubled, 2 * stream.hidden[1])
