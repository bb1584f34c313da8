"""Float64 references of every rule, written from the papers: one step of one tensor, in plain torch operations.

A reference shares no code with ``fused``. It takes and returns float64 tensors of real numbers; hyperparameters come as
the parameter group has them. All are elementwise, which :func:`bounded` makes use of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

State = Mapping[str, Tensor]
Reference = Callable[[Tensor, Tensor, State, int, Mapping[str, Any]], tuple[Tensor, dict[str, Tensor]]]
"""(parameter, gradient, state, number of this step from 1, hyperparameters) -> (parameter, state)."""


def _descent(g: Tensor, h: Mapping[str, Any]) -> Tensor:
    return -g if h.get("maximize") else g


def _penalized(g: Tensor, p: Tensor, h: Mapping[str, Any]) -> Tensor:
    """The gradient with the L2 penalty; untouched where there is none, so that a NaN parameter stays its own affair."""
    return g + float(h["weight_decay"]) * p if h["weight_decay"] != 0 else g


def adam(p: Tensor, g: Tensor, state: State, t: int, h: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """arXiv:1412.6980, Algorithm 1; the L2 penalty of 1711.05101, Algorithm 2 (pink); AMSGrad of 1904.09237."""
    beta1, beta2 = map(float, h["betas"])
    lr, decay = float(h["lr"]), float(h["weight_decay"])
    g = _descent(g, h)
    if not h.get("decoupled_weight_decay"):
        g = _penalized(g, p, h)
    m = beta1 * state["exp_avg"] + (1 - beta1) * g
    v = beta2 * state["exp_avg_sq"] + (1 - beta2) * g**2
    new = {"exp_avg": m, "exp_avg_sq": v}
    if h["amsgrad"]:
        v = torch.maximum(state["max_exp_avg_sq"], v)
        new["max_exp_avg_sq"] = v
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    step = m_hat / (v_hat.sqrt() + h["eps"])
    if h.get("decoupled_weight_decay"):
        step = step + decay * p
    return p - lr * step, new


def lion(p: Tensor, g: Tensor, state: State, t: int, h: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """arXiv:2302.06675, Algorithm 2."""
    beta1, beta2 = map(float, h["betas"])
    g = _descent(g, h)
    m = state["exp_avg"]
    direction = torch.sign(beta1 * m + (1 - beta1) * g)
    return p - float(h["lr"]) * (direction + float(h["weight_decay"]) * p), {"exp_avg": beta2 * m + (1 - beta2) * g}


def sgd(p: Tensor, g: Tensor, state: State, t: int, h: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """torch.optim.SGD's documented algorithm: the first buffer is the gradient, undampened."""
    mu, lr = float(h["momentum"]), float(h["lr"])
    g = _penalized(_descent(g, h), p, h)
    if mu == 0:
        return p - lr * g, {}
    b = g if t == 1 else mu * state["momentum_buffer"] + (1 - float(h["dampening"])) * g
    return p - lr * (g + mu * b if h["nesterov"] else b), {"momentum_buffer": b}


def rmsprop(p: Tensor, g: Tensor, state: State, t: int, h: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Lecture 6.5 of Tieleman and Hinton; centered as arXiv:1308.0850, equations 38 to 40, eps outside the root."""
    alpha, lr = float(h["alpha"]), float(h["lr"])
    g = _penalized(_descent(g, h), p, h)
    v = alpha * state["square_avg"] + (1 - alpha) * g**2
    new = {"square_avg": v}
    variance = v
    if h["centered"]:
        new["grad_avg"] = alpha * state["grad_avg"] + (1 - alpha) * g
        variance = v - new["grad_avg"] ** 2
    step = g / (variance.sqrt() + h["eps"])
    if h["momentum"] > 0:
        step = new["momentum_buffer"] = float(h["momentum"]) * state["momentum_buffer"] + step
    return p - lr * step, new


def adagrad(p: Tensor, g: Tensor, state: State, t: int, h: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """JMLR 12 (2011), Figure 1 with a diagonal matrix; the learning rate falls as torch.optim documents."""
    g = _penalized(_descent(g, h), p, h)
    total = state["sum"] + g**2
    lr = float(h["lr"]) / (1 + (t - 1) * h["lr_decay"])
    return p - lr * g / (total.sqrt() + h["eps"]), {"sum": total}


def adadelta(p: Tensor, g: Tensor, state: State, t: int, h: Mapping[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """arXiv:1212.5701, Algorithm 1: RMS[x] = sqrt(E[x^2] + eps)."""
    rho, eps = float(h["rho"]), h["eps"]
    g = _penalized(_descent(g, h), p, h)
    v = rho * state["square_avg"] + (1 - rho) * g**2
    delta = -((state["acc_delta"] + eps).sqrt() / (v + eps).sqrt()) * g
    u = rho * state["acc_delta"] + (1 - rho) * delta**2
    return p + float(h["lr"]) * delta, {"square_avg": v, "acc_delta": u}


def bounded(
    reference: Reference,
    p: Tensor,
    g: Tensor,
    state: State,
    t: int,
    h: Mapping[str, Any],
    arithmetic: torch.dtype,
    roundings: float,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A step of the reference, and for each result how far another order of operations may be from it.

    Args:
        reference: an elementwise rule.
        p: parameter, any real dtype (as the other tensors); taken to float64.
        g: gradient.
        state: state before the step.
        t: number of the step.
        h: hyperparameters.
        arithmetic: float32 or float64, what the step under test computes in.
        roundings: how many roundings of every input and of the result are allowed for.

    Returns:
        ``(results, bounds)`` by name; the parameter's is ``"param"``. With u the unit roundoff, a result f of inputs
        x_i may be off by ``roundings * u * (sum_i |x_i df/dx_i| + |f| + |change of the parameter|)``. This follows
        cancellation by itself: where m and g nearly cancel, the bound stays theirs. Where f jumps within the roundings
        of the gradient, as at the sign of an average that cancels to nothing, the jump is allowed for as well.
    """
    u = torch.finfo(arithmetic).eps / 2
    inputs = {"param": p, "grad": g, **state}
    leaves = {name: value.detach().double().requires_grad_() for name, value in inputs.items()}
    old_state = {name: leaves[name] for name in state}
    new_p, new_state = reference(leaves["param"], leaves["grad"], old_state, t, h)
    results, bounds = {"param": new_p, **new_state}, {}
    for name, result in results.items():
        partials = torch.autograd.grad(result.sum(), list(leaves.values()), retain_graph=True, allow_unused=True)
        bound = result.detach().abs()
        if name == "param":
            bound = bound + (new_p - leaves["param"]).detach().abs()
        for leaf, partial in zip(leaves.values(), partials, strict=True):
            if partial is not None:
                bound += (leaf.detach() * partial).abs().nan_to_num(0.0, math.inf)
        bounds[name] = roundings * u * bound
    with torch.no_grad():
        for factor in (1 - roundings * u, 1 + roundings * u):
            beside_p, beside_state = reference(leaves["param"], leaves["grad"] * factor, old_state, t, h)
            for name, result in {"param": beside_p, **beside_state}.items():
                bounds[name] = torch.maximum(bounds[name], (result - results[name]).abs().nan_to_num(0.0))
    return {name: result.detach() for name, result in results.items()}, bounds
