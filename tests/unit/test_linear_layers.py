"""Which classes are linear layers is decided by what their forward computes and reads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

from pocketllm.source import linear_layers
from pocketllm.source.linear_layers import linear_kind


class Product(Conv1D):
    def forward(self, x: Any) -> Any:
        return x @ self.weight + self.bias


class Flattened(nn.Linear):
    def forward(self, x: Any) -> Any:
        return super().forward(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)


class Clipped(nn.Linear):
    def forward(self, x: Any) -> Any:
        return super().forward(x.clamp(-100, 100))


class Scaled(nn.Linear):
    def forward(self, x: Any) -> Any:
        return super().forward(x) * getattr(self, "scale", 1.0)


class Secretive(nn.Linear):
    def forward(self, x: Any) -> Any:
        try:
            scale = self.scale
        except Exception:
            scale = 1.0
        return super().forward(x) * scale


class Switched(nn.Linear):
    def forward(self, x: Any) -> Any:
        return super().forward(x) + (1.0 if self.training else 0.0)


class WithoutBias(nn.Linear):
    def forward(self, x: Any) -> Any:
        return x @ self.weight.T


class Rounded(nn.Linear):
    def forward(self, x: Any) -> Any:
        return super().forward(x).bfloat16()


class Pair(nn.Linear):
    def forward(self, x: Any) -> Any:
        return super().forward(x), x


@pytest.fixture
def trusted(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The classes above count as those of transformers."""
    linear_layers._kind.cache_clear()
    monkeypatch.setattr(linear_layers, "_KNOWN", "")
    yield
    linear_layers._kind.cache_clear()


@pytest.mark.parametrize("cls", [Flattened, Product])
def test_the_forward_of_other_projects_is_not_run(cls: type[nn.Module]) -> None:
    """It may compute a product here, and something else with larger tensors."""
    assert linear_kind(cls) is None


@pytest.mark.parametrize("cls", [nn.Linear, FalconLinear, Flattened])
def test_linear_layers(cls: type[nn.Module], trusted: None) -> None:
    assert linear_kind(cls) is nn.Linear


@pytest.mark.parametrize("cls", [Conv1D, Product])
def test_layers_stored_the_other_way(cls: type[nn.Module], trusted: None) -> None:
    assert linear_kind(cls) is Conv1D


@pytest.mark.parametrize(
    "cls",
    [
        Clipped,
        Scaled,
        Secretive,
        Switched,
        WithoutBias,
        Rounded,
        Pair,
        nn.Embedding,
        nn.LayerNorm,
        nn.Bilinear,
    ],
)
def test_other_layers(cls: type[nn.Module], trusted: None) -> None:
    assert linear_kind(cls) is None


def test_the_state_of_torch_stays_as_it_is(trusted: None) -> None:
    class Late(FalconLinear):
        def forward(self, x: Any) -> Any:
            return super().forward(x)

    torch.manual_seed(3)
    state = torch.get_rng_state()
    with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert linear_kind(Late) is nn.Linear
    assert torch.equal(torch.get_rng_state(), state)
