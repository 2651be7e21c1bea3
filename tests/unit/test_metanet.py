"""Meta-encoder and meta-decoder: exact identity start, size, and who sees whom in a row."""

from __future__ import annotations

import pytest
import torch

from pocketllm.codec.metanet import AffineBlock, MetaDecoder, MetaEncoder, MLPBlock
from pocketllm.codec.normalization import reshaped_layer_norm
from pocketllm.config import CodecConfig

NETS = [MetaEncoder, MetaDecoder]


def made(
    kind: type[MetaEncoder] | type[MetaDecoder],
    norm: str,
    start: str,
    d: int = 4,
    hidden: int = 16,
    depth: int = 3,
) -> MetaEncoder | MetaDecoder:
    """A network of the given kind, reset with a fixed generator."""
    net = kind(d, hidden, depth, norm)
    net.reset(start, torch.Generator().manual_seed(1))
    return net


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize(
    ("d", "hidden", "depth"),
    [(1, 2, 1), (4, 8, 2), (4, 16, 3), (8, 16, 3), (6, 17, 5), (5, 0, 1), (5, 0, 3), (5, 16, 0), (5, 0, 0)],
)
def test_identity_start_without_norm(
    kind: type[MetaEncoder] | type[MetaDecoder], d: int, hidden: int, depth: int
) -> None:
    x = torch.randn(3, 10, d)
    net = made(kind, "none", "identity", d, hidden, depth)
    torch.testing.assert_close(net(x), x, rtol=0, atol=1e-6)


@pytest.mark.parametrize("norm", ["rln", "ln", "none"])
def test_identity_start_of_the_decoder_whatever_the_norm(norm: str) -> None:
    """Norms stand only inside residual branches, which start at zero."""
    x = torch.randn(3, 10, 4)
    torch.testing.assert_close(made(MetaDecoder, norm, "identity")(x), x, rtol=0, atol=1e-6)


def test_identity_start_of_the_encoder_is_one_rln() -> None:
    x = 0.5 * torch.randn(3, 10, 4) + 0.2
    net = made(MetaEncoder, "rln", "identity")
    torch.testing.assert_close(net(x), reshaped_layer_norm(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", NETS)
def test_identity_start_can_learn(kind: type[MetaEncoder] | type[MetaDecoder]) -> None:
    """Every block gets a gradient: at once in its last matrix, in the plain block in both."""
    net = made(kind, "none", "identity")
    net(torch.randn(3, 10, 4)).square().sum().backward()
    for block in net.blocks:
        assert isinstance(block, MLPBlock)
        assert block.down.grad is not None
        assert block.down.grad.abs().sum() > 0


def test_affine_blocks_make_an_affine_decoder() -> None:
    net = made(MetaDecoder, "none", "random", d=5, hidden=0)
    with torch.no_grad():
        for block in net.blocks:
            assert isinstance(block, AffineBlock)
            block.down.normal_()
    x, y = torch.randn(2, 3, 7, 5)
    between = net(0.3 * x + 0.7 * y)
    torch.testing.assert_close(between, 0.3 * net(x) + 0.7 * net(y), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(net(torch.zeros(1, 1, 5)), torch.zeros(1, 1, 5))


@pytest.mark.parametrize(("hidden", "depth"), [(16, 3), (0, 2), (16, 0), (0, 0)])
def test_weights_have_the_stored_shapes_and_come_back(hidden: int, depth: int) -> None:
    config = CodecConfig(vector_len=5, hidden=hidden, depth=depth)
    net = made(MetaDecoder, "none", "random", 5, hidden, depth)
    assert tuple(tuple(part.shape) for part in net.weights()) == config.network_shapes
    assert config.decoder_bits == 16 * sum(p.numel() for p in net.parameters())
    other = made(MetaDecoder, "none", "identity", 5, hidden, depth)
    other.set_weights(*net.weights())
    x = torch.randn(2, 4, 5)
    assert torch.equal(other(x), net(x))


def test_the_decoder_has_768_weights_as_published() -> None:
    assert sum(p.numel() for p in MetaDecoder(8, 16, 3, "rln").parameters()) == 768


@pytest.mark.parametrize("start", ["identity", "random"])
@pytest.mark.parametrize("kind", NETS)
def test_reset_is_reproducible(kind: type[MetaEncoder] | type[MetaDecoder], start: str) -> None:
    first, second = made(kind, "rln", start), made(kind, "rln", start)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


def test_random_start_keeps_the_scale_of_its_input() -> None:
    """Unit-variance rows come out neither vanished nor exploded."""
    x = torch.randn(16, 64, 8)
    assert 0.3 < made(MetaDecoder, "rln", "random", d=8)(x).std().item() < 3.0


@pytest.mark.parametrize(("norm", "others_change"), [("rln", True), ("ln", False), ("none", False)])
def test_row_context_of_the_decoder(norm: str, others_change: bool) -> None:
    """With RLN one subvector changes what the others of its row decode to; other rows never notice."""
    net = made(MetaDecoder, norm, "random")
    q = torch.randn(3, 6, 4)
    changed = q.clone()
    changed[1, 2] += 1.0
    with torch.no_grad():
        moved = (net(changed) - net(q)).abs().amax(dim=2)
    others = torch.cat([moved[1, :2], moved[1, 3:]])
    assert moved[1, 2] > 1e-3
    assert bool((others > 1e-5).all()) is others_change
    assert others_change or not others.any()
    assert not moved[0].any()
    assert not moved[2].any()
