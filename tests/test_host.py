"""The host side of a step: how tensors are looked at, and what stands around the step."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.optim import optimizer as optimizer_module

import fused
from fused.backends import extension

pytestmark = pytest.mark.skipif(extension is None, reason="the extension is not built")

PROGRAM = """
import sys, torch, fused
from fused.backends import extension
assert extension.tensor_interface() == sys.argv[1], extension.tensor_interface()

def tensors():
    torch.manual_seed(0)
    base = torch.randn(64)
    complex_ = torch.randn(3, dtype=torch.complex64)
    return [
        torch.randn(5), torch.randn(()), torch.randn(0, 3), torch.randn(4, 6).t(), torch.randn(2, 3, 4, 5).to(
            memory_format=torch.channels_last), base[1:34], base[::2], torch.randn(3, 1).expand(3, 4).clone(),
        torch.randn(7).double(), torch.randn(7).bfloat16(), torch.randn(7).half(), complex_,
        torch.randn(1, 1, 2, 1, 2, 1, 1, 2, 1, 2),
    ]

params = [torch.nn.Parameter(t.clone(memory_format=torch.preserve_format)) for t in tensors()]
params[4].grad_dtype = None
opt = fused.AdamW(params, lr=0.1, max_grad_norm=1.0)
for step in range(4):
    for i, (p, t) in enumerate(zip(params, tensors())):
        p.grad = None if (i + step) % 5 == 0 else t * (step + 1)
        if i == 3 and step == 2:
            p.grad = (t * 3).contiguous()      # other strides than before
        if i == 4 and step == 1:
            p.grad = (t * 2).double()          # another dtype
        if i == 5 and step == 3:
            p.data = p.data.clone()           # moved
        if i == 6 and step == 3:
            p.data, p.grad = torch.randn(4, 4, generator=torch.Generator().manual_seed(1)), torch.ones(4, 4)
            opt.state[p].clear()
    opt.step()

def same_size(shift):
    # What a row shows where its tensors have the shape, dtype and device they had.
    torch.manual_seed(1)
    memory = torch.randn(100)
    params = [torch.nn.Parameter(memory[10 * i:10 * i + 6].view(2, 3)) for i in range(8)]
    other = torch.nn.Parameter(torch.randn(2, 3))
    one = torch.nn.Parameter(torch.randn(1))
    opt = fused.AdamW([*params, one], lr=0.1)
    for step in range(8):
        for p in (*params, one):
            p.grad = torch.full_like(p, 1.0 + step)
        if step == 4:
            params[0].data = memory[82:88].view(2, 3)            # another place in the same storage
            params[1].data = torch.randn(3, 2).t()               # other strides
            opt.state[params[2]]["exp_avg"] = torch.ones(2, 3)   # state replaced, moved and filled anew
            opt.state[params[3]] = {k: v.clone() + 1 for k, v in opt.state[params[3]].items()}
            params[4].grad = torch.ones(3, 2).t()
            params[5].grad = None
            params[6].grad = params[7].grad = torch.arange(50.0)[shift:shift + 6].view(2, 3)
            one.grad = torch._neg_view(torch.ones(1))
        if step == 5:
            for state in opt.state.values():
                for value in state.values():
                    value.data = value.data.clone() * 2
            torch.utils.swap_tensors(params[7], other)
            params[7].grad = torch.ones(2, 3)
        opt.step()
    return [*params, other, one]

params += same_size(0) + same_size(7)
sparse = torch.nn.Parameter(torch.ones(4))
sparse.grad = torch.sparse_coo_tensor(torch.tensor([[1]]), torch.tensor([1.0]), (4,))
try:
    fused.AdamW([sparse]).step()
except RuntimeError as error:
    print(error)
for p in params:
    print(p.dtype, [x.hex() for x in torch.view_as_real(p.data).flatten().double().tolist()] if p.is_complex()
          else [x.hex() for x in p.data.flatten().double().tolist()])
"""


def _run(interface: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, interface],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


@pytest.mark.skipif(sys.platform not in ("linux", "darwin"), reason="looked for on Linux and macOS")
def test_all_ways_to_read_tensors_agree() -> None:
    """Every layout, dtype and change between steps, read from torch's objects, through its stable ABI and DLPack."""
    runs = [
        _run("objects"),
        _run("stable ABI", FUSED_TENSOR_INTERFACE="stable"),
        _run("DLPack", FUSED_TENSOR_INTERFACE="dlpack"),
    ]
    for run in runs:
        assert run.returncode == 0, run.stderr
        assert run.stdout == runs[0].stdout
        # The stable ABI reports a refused question on the terminal: none may be asked.
        assert run.stderr == ""
    assert "sparse" in runs[0].stdout
    assert len(runs[0].stdout.splitlines()) == 34


def test_memory_that_a_lazy_copy_shares() -> None:
    """A lazy copy keeps its values: the parameter gets memory of its own before it is written to."""
    param = torch.nn.Parameter(torch.ones(4))
    param.grad = torch.ones(4)
    optimizer = fused.SGD([param], lr=0.5)
    for _ in range(3):
        optimizer.step()
    copy = torch._lazy_clone(param.detach())
    optimizer.step()
    assert torch.equal(copy, torch.full((4,), -0.5))
    assert torch.equal(param.data, torch.full((4,), -1.0))


def test_state_replaced_before_a_step_that_fails() -> None:
    """The next step finds it still."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(2)]
    optimizer = fused.SGD(params, lr=1.0, momentum=0.5)

    def step(*grads: torch.Tensor) -> None:
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()

    zeros, ones = torch.zeros(3), torch.ones(3)
    for _ in range(3):
        step(zeros, zeros)
    optimizer.state[params[0]] = {"momentum_buffer": torch.full((3,), 2.0)}
    with pytest.raises(RuntimeError, match="sparse"):
        step(zeros, ones.to_sparse())
    assert torch.equal(params[0].data, ones)
    step(zeros, zeros)
    assert torch.equal(params[0].data, zeros)
    assert torch.equal(optimizer.state[params[0]]["momentum_buffer"], ones)


def test_versions_count_steps() -> None:
    """Autograd is told of every write, also where a parameter's class or kind needs torch's own function for it."""

    class Mine(torch.nn.Parameter):
        pass

    with torch.inference_mode():
        untracked = torch.ones(3)
    params = [torch.nn.Parameter(torch.ones(3)), Mine(torch.ones(3)), torch.nn.Parameter(torch.ones(0)), untracked]
    idle = torch.nn.Parameter(torch.ones(3))
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer = fused.SGD([*params, idle], lr=0.5)
    before = [param._version for param in (*params[:3], idle)]
    for _ in range(4):
        optimizer.step()
    assert [param._version - b for param, b in zip((*params[:3], idle), before, strict=True)] == [4, 4, 4, 0]
    params[0].grad, idle.grad = None, torch.ones(3)
    optimizer.step()
    assert [param._version - b for param, b in zip((*params[:3], idle), before, strict=True)] == [4, 5, 5, 1]


def test_a_class_with_a_gradient_of_its_own() -> None:
    """A property ``grad`` in a subclass is asked, not torch.Tensor's, and what it makes lives until the update."""

    class Doubled(torch.nn.Parameter):
        @property
        def grad(self) -> torch.Tensor | None:  # type: ignore[override]
            own = torch.Tensor.grad.__get__(self)  # type: ignore[attr-defined]
            return None if own is None else own * 2

    param, plain = Doubled(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    torch.Tensor.grad.__set__(param, torch.ones(3))  # type: ignore[attr-defined]
    plain.grad = torch.full((3,), 2.0)
    for p in (param, plain):
        optimizer = fused.SGD([p], lr=0.125)
        for _ in range(3):
            optimizer.step()
    assert torch.equal(param.data, plain.data)
    assert torch.equal(plain.data, torch.full((3,), 0.25))


def _optimizer() -> tuple[torch.nn.Parameter, fused.SGD]:
    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    return param, fused.SGD([param], lr=0.5)


def test_a_profiler_sees_the_step_by_name() -> None:
    _, optimizer = _optimizer()
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert [e.name for e in profile.events()].count("Optimizer.step#SGD.step") == 1


@pytest.mark.parametrize("everywhere", [False, True], ids=["own", "global"])
def test_hooks_run_once_around_the_step(everywhere: bool) -> None:
    param, optimizer = _optimizer()
    seen: list[Any] = []
    pre = optimizer_module.register_optimizer_step_pre_hook if everywhere else optimizer.register_step_pre_hook
    post = optimizer_module.register_optimizer_step_post_hook if everywhere else optimizer.register_step_post_hook
    handles = [pre(lambda *_: seen.append(param[0].item())), post(lambda *_: seen.append(param[0].item()))]
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert seen == [1.0, 0.5]
    optimizer.step()
    assert seen == [1.0, 0.5]


def test_a_subclass_runs_hooks_once() -> None:
    class Mine(fused.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    param = torch.nn.Parameter(torch.ones(3))
    param.grad = torch.ones(3)
    optimizer, seen = Mine([param], lr=0.5), []
    optimizer.register_step_post_hook(lambda *_: seen.append(param[0].item()))
    optimizer.step()
    assert seen
    assert set(seen) == {0.5}
