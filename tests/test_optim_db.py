"""PyTorch's own database of optimizer inputs, which its test suite runs on torch.optim, drives our classes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import fused

pytest.importorskip("expecttest", reason="PyTorch's testing package needs it")

from torch.testing._internal.common_optimizers import optim_db

INFOS = [
    info for info in optim_db if hasattr(fused, info.optim_cls.__name__) and info.optim_cls.__name__ != "Adafactor"
]
each_info = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.optim_cls.__name__)


def ours_of(info: Any) -> type[fused.FusedOptimizer]:
    cls: type[fused.FusedOptimizer] = getattr(fused, info.optim_cls.__name__)
    return cls


def inputs_of(info: Any) -> list[Any]:
    return list(info.optim_inputs_func(device="cpu"))


def test_the_database_knows_our_classes() -> None:
    assert {"Adadelta", "Adagrad", "Adam", "AdamW", "RMSprop", "SGD"} <= {i.optim_cls.__name__ for i in INFOS}


@each_info
def test_error_inputs(info: Any) -> None:
    for error in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given = error.optimizer_error_input
        expected = pytest.warns if issubclass(error.error_type, Warning) else pytest.raises
        with expected(error.error_type, match=error.error_regex):
            ours_of(info)(given.params, **given.kwargs)


@each_info
def test_inputs_give_torchs_result(info: Any) -> None:
    """Every set of options, on the shapes and gradients of PyTorch's own comparison of its implementations."""
    for given in inputs_of(info):
        kwargs = copy.deepcopy(given.kwargs)
        for dtype in (torch.float32, torch.float64):
            made = []
            for cls in (info.optim_cls, ours_of(info)):
                torch.manual_seed(0)
                params = [torch.nn.Parameter(torch.randn(*shape, dtype=dtype)) for shape in ((2, 3), (3,), (1,))]
                optimizer = cls(params, **copy.deepcopy(kwargs))
                for _ in range(7):
                    for p in params:
                        p.grad = torch.randn_like(p) * 0.5
                    optimizer.step()
                made.append((params, optimizer))
            (theirs, torch_one), (ours, our_one) = made
            for p, q in zip(ours, theirs, strict=True):
                torch.testing.assert_close(
                    p, q, rtol=2e-5 if dtype == torch.float32 else 1e-9, atol=1e-6, msg=given.desc
                )
                for name, value in torch_one.state[q].items():
                    if isinstance(value, torch.Tensor):
                        torch.testing.assert_close(our_one.state[p][name], value, rtol=1e-5, atol=1e-6, msg=name)


@each_info
def test_inputs_survive_a_state_dict(info: Any) -> None:
    """Saved and loaded in the middle, each way between torch and here, state tensor by state tensor."""
    for given in inputs_of(info):
        if any(isinstance(v, torch.Tensor) for v in given.kwargs.values()):
            continue  # compared above; PyTorch leaves these out of its own state_dict tests
        for source_cls, target_cls in ((info.optim_cls, ours_of(info)), (ours_of(info), info.optim_cls)):
            params = [torch.nn.Parameter(torch.randn(4, 3)), torch.nn.Parameter(torch.randn(5))]
            source = source_cls(params, **given.kwargs)
            for p in params:
                p.grad = torch.randn_like(p)
            source.step()
            target = target_cls(params, **given.kwargs)
            target.load_state_dict(source.state_dict())
            for p in params:
                for name, value in source.state[p].items():
                    if isinstance(value, torch.Tensor):
                        assert torch.equal(torch.as_tensor(target.state[p][name]), value), (given.desc, name)
            target.step()
