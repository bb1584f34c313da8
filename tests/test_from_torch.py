"""Turning live torch.optim optimizers into ours: the run goes on as if nothing had happened."""

import copy

import pytest
import torch

import fused

CASES = [
    (torch.optim.AdamW, fused.AdamW, {"weight_decay": 0.1}),
    (torch.optim.Adam, fused.Adam, {"amsgrad": True}),
    (torch.optim.SGD, fused.SGD, {"momentum": 0.9, "dampening": 0.2}),
    (torch.optim.RMSprop, fused.RMSprop, {"momentum": 0.9, "centered": True, "eps": 1e-3}),
    (torch.optim.Adagrad, fused.Adagrad, {"initial_accumulator_value": 0.1}),
    (torch.optim.Adadelta, fused.Adadelta, {}),
]


def _model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(7, 65), torch.nn.Tanh(), torch.nn.Linear(65, 3))


def _train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.randn(16, 7, generator=generator)).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize(("torch_class", "our_class", "kwargs"), CASES, ids=[case[1].__name__ for case in CASES])
def test_run_continues(torch_class, our_class, kwargs):
    model = _model()
    optimizer = torch_class(list(model.named_parameters()), **kwargs)
    _train(model, optimizer, seed=1)
    twin = copy.deepcopy(model)
    stayed = torch_class(list(twin.named_parameters()), **kwargs)
    stayed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    moved = fused.from_torch(optimizer)
    assert type(moved) is our_class
    assert moved.param_groups[0]["param_names"] == [name for name, _ in model.named_parameters()]
    big = [v for state in moved.state.values() for k, v in state.items() if k != "step"]
    taken_from = {t.data_ptr() for state in optimizer.state.values() for t in state.values()}
    assert big
    assert all(v.data_ptr() in taken_from for v in big), "state is moved, not copied"
    _train(model, moved, seed=2)
    _train(twin, stayed, seed=2)
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    start = _model()
    assert not torch.equal(start[0].weight, model[0].weight)


def test_group_options_survive():
    model = _model()
    groups = [
        {"params": [model[0].weight], "lr": 0.5, "weight_decay": 0.0},
        {"params": [model[0].bias, model[2].weight, model[2].bias]},
    ]
    moved = fused.from_torch(torch.optim.AdamW(groups, lr=0.25), max_grad_norm=1.0)
    assert [group["lr"] for group in moved.param_groups] == [0.5, 0.25]
    assert moved.param_groups[0]["weight_decay"] == 0.0
    assert moved.defaults["max_grad_norm"] == 1.0


def test_unknown_class_is_named():
    parameter = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(TypeError, match="ASGD"):
        fused.from_torch(torch.optim.ASGD([parameter]))
