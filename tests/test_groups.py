"""The usual parameter groups."""

import pytest
import torch
from torch import nn

import fused


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attention = nn.Linear(8, 8)


class _Model(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.tok_embed = nn.Embedding(10, 8)
        self.blocks = nn.ModuleList(_Block() for _ in range(depth))
        self.final_norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 10, bias=False)
        self.head.weight = self.tok_embed.weight
        self.frozen = nn.Parameter(torch.zeros(3, 3), requires_grad=False)


def _by_name(groups):
    return {name: group for group in groups for name, _ in group["params"]}


def test_decay_spares_norms_and_biases():
    groups = fused.param_groups(_Model(), lr=0.1, weight_decay=0.5)
    decays = {name: group["weight_decay"] for name, group in _by_name(groups).items()}
    assert len(groups) == 2
    assert decays["blocks.0.attention.weight"] == 0.5
    assert decays["tok_embed.weight"] == 0.5
    assert decays["blocks.0.attention.bias"] == 0.0
    assert decays["blocks.0.norm.weight"] == 0.0
    assert decays["final_norm.bias"] == 0.0
    assert "frozen" not in decays
    assert "head.weight" not in decays, "a shared parameter is taken once"


def test_layer_decay():
    by_name = _by_name(fused.param_groups(_Model(), lr=1.0, layer_decay=0.5))
    rates = {name: group["lr"] for name, group in by_name.items()}
    assert rates["tok_embed.weight"] == 0.5**4
    assert rates["blocks.0.attention.weight"] == 0.5**3
    assert rates["blocks.2.norm.weight"] == 0.5
    assert rates["final_norm.weight"] == 1.0


def test_groups_step():
    model = _Model()
    optimizer = fused.AdamW(fused.param_groups(model, lr=1e-2, layer_decay=0.9))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.ones_like(p)
    optimizer.step()
    assert all(not torch.equal(before[n], p) for n, p in model.named_parameters() if p.requires_grad)


def test_wrong_arguments():
    with pytest.raises(ValueError, match=r"layer_decay value: 1\.5"):
        fused.param_groups(_Model(), lr=1.0, layer_decay=1.5)
    for name in ("lr", "weight_decay", "layer_decay"):
        with pytest.raises(TypeError, match=f"{name} must be a number, got '0.1'"):
            fused.param_groups(_Model(), **{"lr": 1.0, name: "0.1"})
    with pytest.raises(ValueError, match="layer_of"):
        fused.param_groups(nn.Linear(2, 2), lr=1.0, layer_decay=0.5)
    by_kind = {"weight": 1, "bias": 0}
    groups = fused.param_groups(nn.Linear(2, 2), lr=1.0, layer_decay=0.5, layer_of=by_kind.get)
    assert sorted(group["lr"] for group in groups) == [0.25, 0.5]


def test_model_can_exempt_names():
    class Exempting(_Model):
        def no_weight_decay(self):
            return {"tok_embed.weight"}

    assert _by_name(fused.param_groups(Exempting(), lr=1.0))["tok_embed.weight"]["weight_decay"] == 0.0
