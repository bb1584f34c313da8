"""The systems that can be measured: this package, torch.optim in its forms, and (in peers.py) third parties."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cases import Case
from .problem import NotAvailable, Problem, Side


@dataclass(frozen=True)
class Options:
    """What the command line says about how to build the sides."""

    backend: str | None = None
    groups: int = 1
    fused_kwargs: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class System:
    key: str
    title: str
    build: Callable[[Case, Problem, Options], Side]
    package: str | None = None  # the distribution whose version is reported
    module: str | None = None
    compiles: bool = False  # at its first step, for up to minutes

    def installed(self) -> bool:
        return self.module is None or importlib.util.find_spec(self.module.partition(".")[0]) is not None

    def version(self) -> str:
        try:
            return importlib.metadata.version(self.package or "")
        except (importlib.metadata.PackageNotFoundError, ValueError):
            return ""

    def make(self, case: Case, problem: Problem, options: Options) -> Side:
        if not self.installed():
            raise NotAvailable("not installed")
        return self.build(case, problem, options)


def split_groups(params: list[Tensor], groups: int) -> Any:
    """The parameters as `groups` parameter groups of about equal length, each with its own learning-rate scale."""
    if groups <= 1:
        return params
    return [{"params": params[i::groups]} for i in range(min(groups, len(params)))]


def _fused(case: Case, problem: Problem, options: Options) -> Side:
    try:
        import fused
    except ImportError as error:
        raise NotAvailable(f"cannot import fused: {error}") from None
    cls = getattr(fused, case.cls, None)
    if cls is None:
        raise NotAvailable(f"no {case.cls} yet")
    kwargs = {**case.kwargs, **problem.precision.options(), **dict(options.fused_kwargs)}
    if options.backend:
        kwargs["backend"] = options.backend
    params = problem.parameters()
    try:
        optimizer = cls(split_groups(params, options.groups), **kwargs)
        if problem.device.type == "cuda" and hasattr(fused, "warmup"):
            fused.warmup(optimizer)
    except (NotImplementedError, RuntimeError, ImportError, TypeError, ValueError) as error:
        raise NotAvailable(f"{type(error).__name__}: {error}") from None
    label = "fused" + (f" ({options.backend})" if options.backend else "")
    return Side("fused", label, params, optimizer.step, optimizer)


class ForeachLion(torch.optim.Optimizer):
    """What a torch user writes for Lion: the fewest torch operations, over lists or tensor by tensor."""

    def __init__(self, params: Any, lr: float, betas: tuple[float, float], weight_decay: float, foreach: bool) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "foreach": foreach})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = group["params"]
            momenta = [self.state[p].get("exp_avg") for p in params]
            for i, p in enumerate(params):
                if momenta[i] is None:
                    momenta[i] = self.state[p]["exp_avg"] = torch.zeros_like(p)
            lr, (b1, b2) = group["lr"], group["betas"]
            decay = 1 - lr * group["weight_decay"]
            grads = [p.grad for p in params]
            if group["foreach"]:
                updates = torch._foreach_lerp(momenta, grads, 1 - b1)
                torch._foreach_sign_(updates)
                torch._foreach_mul_(params, decay)
                torch._foreach_add_(params, updates, alpha=-lr)
                torch._foreach_lerp_(momenta, grads, 1 - b2)
            else:
                for p, m, g in zip(params, momenta, grads, strict=True):
                    update = torch.lerp(m, g, 1 - b1).sign_()
                    p.mul_(decay).add_(update, alpha=-lr)
                    m.lerp_(g, 1 - b2)


def torch_optimizer(case: Case, params: Any, form: str) -> torch.optim.Optimizer:
    if case.cls == "Lion":
        return ForeachLion(params, foreach=form != "loop", **case.kwargs)
    flags: dict[str, bool] = {"foreach": form in ("foreach", "compile")}
    if "fused" in case.torch_forms:
        flags["fused"] = form == "fused"
    return getattr(torch.optim, case.cls)(params, **case.kwargs, **flags)  # type: ignore[no-any-return]


def _torch(form: str) -> Callable[[Case, Problem, Options], Side]:
    def build(case: Case, problem: Problem, options: Options) -> Side:
        if form == "fused" and "fused" not in case.torch_forms:
            raise NotAvailable(f"no fused {case.cls}")
        label = f"torch {form}"
        precision = problem.precision
        if precision.master is None:  # the same storage, states in the parameter's dtype
            params = problem.parameters()
            optimizer = torch_optimizer(case, split_groups(params, options.groups), form)
            return Side(f"torch.{form}", label, params, _compiled(optimizer, form), optimizer)

        masters = problem.parameters(torch.float32, grads=torch.float32)
        low = problem.parameters(grads=False)
        optimizer = torch_optimizer(case, split_groups(masters, options.groups), form)
        step = _compiled(optimizer, form)

        @torch.no_grad()
        def step_and_cast() -> None:
            step()
            torch._foreach_copy_(low, masters)

        note = "float32 masters and gradients, then a cast"
        return Side(
            f"torch.{form}", f"{label} + cast", low, step_and_cast, optimizer, extra=masters, note=note, grad_bytes=4
        )

    return build


def _compiled(optimizer: torch.optim.Optimizer, form: str) -> Callable[[], Any]:
    if form != "compile":
        return optimizer.step
    compiled: Callable[[], Any] = torch.compile(lambda: optimizer.step())  # noqa: PLW0108
    return compiled


SYSTEMS: dict[str, System] = {
    s.key: s
    for s in (
        System("fused", "this package", _fused, "fused-optim", "fused"),
        System("torch.fused", "torch.optim, fused=True", _torch("fused"), "torch"),
        System("torch.foreach", "torch.optim, foreach=True", _torch("foreach"), "torch"),
        System("torch.loop", "torch.optim, one tensor after the other", _torch("loop"), "torch"),
        System("torch.compile", "torch.compile of the foreach step", _torch("compile"), "torch"),
    )
}
TORCH = ("torch.fused", "torch.foreach", "torch.loop")


def register(system: System) -> None:
    SYSTEMS[system.key] = system


def get_systems(names: str) -> list[System]:
    """Systems from a comma list; 'torch' is the three plain forms, 'all' everything, 'none' nothing beside ours.

    torch.compile takes minutes for a large model: only where it is named.
    """
    if names == "none":
        return []
    from . import peers  # noqa: F401  registers the third parties

    everything = [k for k in SYSTEMS if k not in ("fused", "torch.compile")]
    keys: list[str] = []
    for name in names.split(","):
        name = name.strip().lower()
        keys += {"all": everything, "torch": list(TORCH)}.get(name, [name])
    unknown = [k for k in keys if k not in SYSTEMS]
    if unknown:
        raise ValueError(f"no system {', '.join(unknown)}: one of {', '.join(SYSTEMS)}")
    return [SYSTEMS[k] for k in dict.fromkeys(keys) if k != "fused"]
