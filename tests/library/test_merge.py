"""merge: what is refused because no plain weight can hold it, with the model as it was."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import s2a_cli

SHAPE = (1, 6, 8)


class Block(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(16), layer

    def forward(self, x):
        return x + torch.relu(self.fc(self.norm(x)))


class Net(nn.Module):
    """Takes [B, N, 8]; the layers are those of its three blocks."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.emb, self.out = nn.Linear(8, 16), nn.Linear(16, 5)
        self.blocks = nn.ModuleList(map(Block, layers))

    def forward(self, x):
        x = self.emb(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x.mean(1))


def tied() -> Sequence[nn.Linear]:
    """Three layers with one weight."""
    layers = [nn.Linear(16, 16) for _ in range(3)]
    for layer in layers[1:]:
        layer.weight = layers[0].weight
    return layers


def shared() -> Sequence[nn.Module]:
    """One layer three times."""
    return [nn.Linear(16, 16)] * 3


def computed() -> Sequence[nn.Module]:
    """Layers that compute their weights."""
    return [parametrizations.weight_norm(nn.Linear(16, 16)) for _ in range(3)]


def hooked() -> Sequence[nn.Module]:
    """Layers whose weights a hook computes."""
    with pytest.warns(FutureWarning, match="deprecated"):
        return [torch.nn.utils.weight_norm(nn.Linear(16, 16)) for _ in range(3)]


def attach(layers: Sequence[nn.Module], method: str, **settings) -> s2a_cli.Attached:
    if method != "ssf":
        pytest.importorskip("peft", reason="peft is not installed")
        settings["target"] = "all"
    model = Net(layers).double()
    attached = s2a_cli.attach(model, method, inputs=SHAPE, blocks=model.blocks, **settings)
    with torch.no_grad():
        for p in attached.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return attached


@pytest.mark.parametrize("method", ["ssf", "lora"])
@pytest.mark.parametrize(
    ("layers", "said"),
    [(tied, r"blocks\.0\.fc.*, .* share a weight that"), (computed, r"blocks\.0\.fc.* computes its weight from other")],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_weights_that_can_not_hold_what_was_added_are_left(layers, said, method):
    attached, x = attach(layers(), method), torch.randn(2, *SHAPE[1:], dtype=torch.float64)
    output = attached.model(x)
    with pytest.raises(s2a_cli.UserError, match=said):
        attached.merge()
    assert torch.equal(attached.model(x), output)
    attached.detach()


@pytest.mark.parametrize("layers", [shared, lambda: [nn.Linear(16, 16) for _ in range(3)]], ids=["shared", "plain"])
def test_a_layer_in_several_blocks_is_merged_once(layers):
    attached, x = attach(layers(), "ssf"), torch.randn(2, *SHAPE[1:], dtype=torch.float64)
    output = attached.model(x)
    torch.testing.assert_close(attached.merge()(x), output)


@pytest.mark.parametrize(("layers", "said"), [(shared, "has several names in the model"), (hooked, "a hook of blocks")])
def test_layers_that_peft_can_not_replace_are_refused(layers, said):
    with pytest.raises(s2a_cli.UserError, match=rf"method=lora: .*{said}"):
        attach(layers(), "lora")


def test_a_norm_over_more_than_channels_has_no_scale_a_channel():
    with pytest.raises(s2a_cli.UserError, match=r"blocks\.0\.fc is a LayerNorm of more than channels"):
        attach([nn.LayerNorm((6, 16)) for _ in range(3)], "ssf")


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1, groups=2)

    def forward(self, x):
        return x + torch.relu(self.conv(x))


@pytest.mark.parametrize("fields", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_what_peft_can_not_merge_is_known_before(fields):
    pytest.importorskip("peft", reason="peft is not installed")
    model = nn.Sequential(
        nn.Conv2d(3, 16, 1), Grouped(), Grouped(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)
    )
    attached = s2a_cli.attach(
        model, "lora", inputs=(1, 3, 6, 6), blocks=[model[1], model[2]], target="all", peft={"r": 4, **fields}
    )
    layers = [type(module) for module in model.modules()]
    with pytest.raises(s2a_cli.UserError, match="peft merges no LoRA into convolutions with groups"):
        attached.merge()
    assert [type(module) for module in model.modules()] == layers
