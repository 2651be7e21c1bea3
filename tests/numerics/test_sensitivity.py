"""Gradients at the outputs of layers: what rows cost together, and which tokens count."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pocketllm.calibrate import autocast as compute, gradients, sensitivity
from pocketllm.calibrate.blocks import BlockStream
from pocketllm.calibrate.calibration import read_windows
from pocketllm.calibrate.input_hessians import Collector
from pocketllm.calibrate.output_hessians import output_hessians
from pocketllm.plan.matrices import Matrix
from pocketllm.plan.selection import classify
from pocketllm.source.dense_checkpoint import open_dense
from pocketllm.source.folder import load_dense
from tests import tiny


def test_the_hessian_of_outputs_is_that_of_the_gradients(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Against one backward pass of the whole model, for targets that are always the likeliest token."""
    monkeypatch.setattr(torch, "multinomial", lambda p, *_, **__: p.argmax(dim=-1, keepdim=True))
    monkeypatch.setattr(gradients, "LOUDEST_GRADIENT", 1e9)
    source = open_dense(tiny.save(tmp_path / "dense"))
    config = tiny.on_trellis(calibration={"two_sided": True})
    text = read_windows(source, config)
    assert text is not None
    windows = text.windows
    matrices, _ = classify(source, config)
    found = sensitivity.measure(
        source, windows, matrices, 0.01, 0, two_sided=True, outputs=tmp_path / "after"
    )
    model = load_dense(tmp_path / "dense")
    seen: dict[str, Tensor] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and ".layers." in name:
            layer.register_full_backward_hook(
                lambda _layer, _before, after, name=name: seen.update({f"{name}.weight": after[0]})
            )
    logits = model(windows).logits.flatten(0, 1)
    nn.functional.cross_entropy(logits, logits.argmax(dim=-1), reduction="sum").backward()
    for number in (0, 1):
        names = [m.name for m in matrices]
        kept = output_hessians(tmp_path / "after", f"model.layers.{number}", "cpu", names)
        assert len(kept) == 7 and set(kept) <= set(found.strip_rows)
        for name, hessian in kept.items():
            flat = seen[name].flatten(0, -2)
            expected = flat.T @ flat
            expected /= expected.diagonal().mean()
            # The stream computes in bfloat16, where another token may be the likeliest.
            assert float((hessian - expected).norm() / expected.norm()) < 0.12, name


def test_a_layer_without_influence_on_the_output(tmp_path: Path) -> None:
    """Its gradients are zero, and so is their Hessian: no division by it."""
    folder = tiny.save(tmp_path / "dense")
    name = "model.layers.0.mlp.down_proj.weight"
    stored = load_file(folder / "model.safetensors")
    save_file(
        {**stored, name: torch.zeros_like(stored[name])}, folder / "model.safetensors", {"format": "pt"}
    )
    source = open_dense(folder)
    matrices, _ = classify(source, tiny.on_trellis())
    outputs, windows = tmp_path / "after", torch.arange(3, 67)[None]
    sensitivity.measure(source, windows, matrices, 0.01, 0, two_sided=True, outputs=outputs)
    kept = output_hessians(outputs, "model.layers.0", "cpu", [m.name for m in matrices])
    assert not kept["model.layers.0.mlp.up_proj.weight"].any()
    assert all(hessian.isfinite().all() for hessian in kept.values())


def test_a_head_that_is_converted_some_rows_at_a_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Where products are in float32 and the head is not, against a head in float32."""
    monkeypatch.setattr(gradients, "fast_dtype", lambda device: torch.float32)
    monkeypatch.setattr(gradients, "autocast", lambda device: nullcontext())
    monkeypatch.setattr(gradients, "STRIP_WEIGHTS", 10 * 36)
    tiny.model().bfloat16().save_pretrained(tmp_path / "dense")
    windows, found = torch.arange(3, 35)[None], list[tuple[Tensor, Tensor]]()
    for dtype in (torch.bfloat16, torch.float32):
        stream = BlockStream(open_dense(tmp_path / "dense"), windows, batch=1)
        head = gradients.Head(stream, 0)
        assert head.is_converted
        stream.set_weight("lm_head.weight", head.head.weight, dtype)
        head.is_converted = dtype != torch.float32
        found.append((head.backward(0), head.rows))
    for converted, plain in zip(*found, strict=True):
        torch.testing.assert_close(converted, plain)


def test_tokens_are_weighted_where_few_have_most_of_the_gradient() -> None:
    loud, even = torch.randn(1, 200, 8), torch.randn(1, 200, 8)
    loud[0, 3] *= 500
    outputs = gradients.OutputGradients()
    for name, gradient in (("loud", loud), ("even", even), ("loud", loud), ("even", even)):
        outputs.add(name, gradient)
    weights = outputs.token_weights(2)
    assert set(weights) == {"loud"} and weights["loud"].shape == (2, 200)
    assert float(weights["loud"][0, 3]) == 30 and 0.5 < float(weights["loud"].float().median()) < 2
    sizes = loud[0].norm(dim=1)
    assert float(outputs.squares["loud"].trace()) < 3 * float((sizes.median() * 3) ** 2 * 200)


def test_inputs_are_multiplied_by_their_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute, "fast_dtype", lambda device: torch.float32)
    model, x = nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 4)]), torch.randn(1, 20, 6)
    matrices = [Matrix(f"{n}.weight", (4, 6), 4, 6, str(n), True) for n in (0, 1)]
    weights = torch.rand(20) + 0.5
    weights[:8] = 0  # not measured
    collector = Collector(model, matrices)
    with collector.watching(), collector.batch({"1.weight": weights}):
        for layer in model:
            layer(x)
    found = collector.inputs("cpu")
    weighted = x[0, 8:] * weights[8:, None]
    assert torch.allclose(found.hessians["0.weight"], x[0].T @ x[0] / 20, atol=1e-5)
    assert torch.allclose(found.hessians["1.weight"], weighted.T @ weighted / 12, atol=1e-5)
    assert found.tokens == {"0.weight": 20, "1.weight": 12}
