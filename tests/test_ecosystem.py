"""What the libraries around an optimizer do with it, without those libraries: each test plays one of their habits."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from cases import CASES, Case
from conftest import Backend
from oracle import make_params, set_gradients

import fused
from fused.precision import GROUP_OPTIONS

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
CPU = torch.device("cpu")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_gradients_in_the_buckets_of_data_parallel_training(backend: Backend) -> None:
    """DistributedDataParallel leaves views of one buffer, aligned to one element alone."""
    from torch.nn.parallel import DistributedDataParallel

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        plain = torch.nn.Sequential(
            torch.nn.Linear(3, 1), torch.nn.Tanh(), torch.nn.Linear(1, 67), torch.nn.Linear(67, 1)
        ).to(backend.device)
        net = copy.deepcopy(plain)
        parallel = DistributedDataParallel(net, gradient_as_bucket_view=True)
        made = [fused.AdamW(module.parameters(), lr=0.1, backend=backend.name) for module in (plain, net)]
        for seed in range(4):
            torch.manual_seed(seed)
            x = torch.randn(5, 3).to(backend.device)
            for model, optimizer in zip((plain, parallel), made, strict=True):
                model(x).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=seed < 2)
        assert any(p.grad is not None and p.grad.storage_offset() for p in net.parameters())
        assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), net.parameters(), strict=True))
    finally:
        torch.distributed.destroy_process_group()


@each_case
def test_group_keys_are_the_same_in_every_version(case: Case) -> None:
    """torchtitan looks up each key of a live group in the checkpoint: a new one breaks every old checkpoint."""
    keys = set(case.make([torch.nn.Parameter(torch.ones(1))]).param_groups[0])
    if case.counterpart is None:
        theirs = {"params", "lr", "betas", "weight_decay", "maximize"}
        assert keys - set(GROUP_OPTIONS) >= theirs
    else:
        theirs = set(case.make_counterpart([torch.nn.Parameter(torch.ones(1))]).param_groups[0])
        assert keys - set(GROUP_OPTIONS) == theirs
    assert GROUP_OPTIONS == ("master_weights", "state_dtype", "stochastic_rounding")


@each_case
def test_a_class_made_of_two(case: Case) -> None:
    """Lightning Fabric wraps an optimizer in a class derived from the optimizer's, and copies its attributes."""
    inner = case.make([torch.nn.Parameter(torch.ones(3))], lr=0.1)

    class Wrapper:
        def __init__(self, optimizer: torch.optim.Optimizer) -> None:
            self.__dict__ = {k: v for k, v in optimizer.__dict__.items() if k not in ("state_dict", "step")}
            self.__class__ = type("Fabric" + type(optimizer).__name__, (Wrapper, type(optimizer)), {})
            self.optimizer = optimizer

        def step(self) -> None:
            self.optimizer.step()

    wrapped = Wrapper(inner)
    assert isinstance(wrapped, case.optimizer)
    p = inner.param_groups[0]["params"][0]
    p.grad = torch.ones(3)
    wrapped.step()
    assert bool((p != 1.0).any()) and wrapped.param_groups is inner.param_groups
    assert "__slots__" not in vars(case.optimizer) and type(case.optimizer) is type


@each_case
def test_prepared_by_accelerate(case: Case) -> None:
    """The optimizer is loaded with its own state, wrapped, and stepped through a method put in the place of its own."""
    params, twins = (make_params([(9,), (2, 3)], torch.bfloat16, CPU) for _ in range(2))
    with torch.no_grad():
        for p, q in zip(params, twins, strict=True):
            q.copy_(p)
    options = {"state_dtype": torch.float32, "lr": 0.1}
    ours, plain = case.make(params, **options), case.make(twins, **options)
    for turn in range(3):
        if turn:
            ours.load_state_dict(ours.state_dict())
            ours = pickle.loads(pickle.dumps(ours)) if turn == 2 else ours  # as a checkpoint of the whole object
            params = [p for group in ours.param_groups for p in group["params"]]
        stepped = []
        original = ours.step
        ours.step = lambda *args, call=original, seen=stepped: (seen.append(1), call(*args))[1]  # type: ignore[method-assign]
        set_gradients(params)
        for p, q in zip(params, twins, strict=True):
            assert p.grad is not None
            q.grad = p.grad.clone()
        ours.step()
        plain.step()
        del ours.step
        assert stepped == [1]
    for p, q in zip(params, twins, strict=True):
        assert torch.equal(p, q)
        for name, value in plain.state[q].items():
            assert value.dtype is torch.float32 and torch.equal(value, ours.state[p][name]), name


@each_case
def test_no_loss_scale_is_taken_over_unasked(case: Case) -> None:
    """The flag makes Lightning refuse to clip in bfloat16, and accelerate miss skipped steps."""
    p = [torch.nn.Parameter(torch.ones(1))]
    assert case.make(p)._step_supports_amp_scaling is False
    assert case.make(p, amp_scaling=True)._step_supports_amp_scaling is True
    assert not hasattr(case.optimizer, "grad_scale")  # GradScaler deletes the attribute that it has set


def test_adamw_stays_decoupled(backend: Backend) -> None:
    """A state dictionary of Adam, or of an AdamW older than the option, must not couple AdamW's decay."""
    p, q = (torch.nn.Parameter(torch.full((3,), 2.0, device=backend.device)) for _ in range(2))
    loaded, fresh = (fused.AdamW([x], lr=0.1, weight_decay=0.5, backend=backend.name) for x in (p, q))
    saved = fused.Adam([p], lr=0.1, weight_decay=0.5).state_dict()
    assert saved["param_groups"][0]["decoupled_weight_decay"] is False
    loaded.load_state_dict(saved)
    loaded.param_groups[0].update({key: fresh.param_groups[0][key] for key in ("betas", "eps")})
    for x, optimizer in ((p, loaded), (q, fresh)):
        x.grad = torch.ones_like(x)
        optimizer.step()
    assert torch.equal(p, q)


@each_case
@pytest.mark.parametrize("scale", [1e-4, 1.0, 3e4])
def test_float16_states_stay_finite(case: Case, scale: float, backend: Backend) -> None:
    """torch's Adam over float16 reaches infinities: squares and eps leave the format's range within the step."""
    p = torch.nn.Parameter(torch.ones(40, dtype=torch.float16, device=backend.device))
    optimizer = case.make([p], lr=1e-3, state_dtype=torch.float32, backend=backend.name)
    for _ in range(3):
        p.grad = torch.full_like(p, scale)
        optimizer.step()
        limit = float("inf") if case.name == "SGD" and scale > 1e4 else 10.0
        assert bool((p.detach().abs() < limit).all())
