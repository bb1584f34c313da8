"""Plain torch: the executable specification of every rule, and the backend where there is no other.

It serves any device torch has, autograd (``differentiable=True``) and ``torch.compile``. The rules stand in the order
of ``csrc/rules.h`` and say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from .. import formats
from .. import state as state_storage
from ..plan import Control
from ..precision import Storage, widest_float
from ..rules import Rule
from ..state import local, real
from ..validation import check_hypers, check_row

if TYPE_CHECKING:
    from ..optimizer import FusedOptimizer

Number = Any
"""A Python number, or a tensor where autograd, torch.compile or a device must not be left."""

States = list[Tensor]
Hypers = dict[str, Number]


def _correction(beta: Number, step: Number) -> Number:
    """1 - beta^step."""
    return 1.0 - beta ** (_scalar(step, step.device) if isinstance(step, Tensor) else step)


def _lerp(start: Tensor, end: Tensor, weight: Number) -> Tensor:
    return torch.lerp(start, end, weight)


def _axpy(scale: Number, x: Tensor, y: Tensor) -> Tensor:
    """y + scale * x."""
    if isinstance(scale, Tensor):  # in float64, which would make tensors without dimensions of float32 wider
        return (y + scale * x).to(y.dtype)
    return torch.add(y, x, alpha=scale)


def _add_l2(g: Tensor, p: Tensor, weight_decay: Number) -> Tensor:
    if not isinstance(weight_decay, Tensor) and weight_decay == 0:
        return g
    return _axpy(weight_decay, p, g)


def adam(p: Tensor, g: Tensor, s: States, h: Hypers, step: Number) -> tuple[Tensor, States]:
    """Adam (arXiv:1412.6980) and AdamW (arXiv:1711.05101)."""
    beta1, beta2 = h["betas"]
    decoupled = h["decoupled_weight_decay"]
    if not decoupled:
        g = _add_l2(g, p, h["weight_decay"])
    exp_avg = _lerp(s[0], g, 1 - beta1)
    exp_avg_sq = s[1] * beta2 + (1 - beta2) * g * g
    states = [exp_avg, exp_avg_sq]
    second = exp_avg_sq
    if len(s) == 3:
        second = torch.maximum(s[2], exp_avg_sq)
        states.append(second)
    if decoupled:
        p = p * (1 - h["lr"] * h["weight_decay"])
    denominator = second.sqrt() / _correction(beta2, step) ** 0.5 + h["eps"]
    return p - h["lr"] / _correction(beta1, step) * exp_avg / denominator, states


def lion(p: Tensor, g: Tensor, s: States, h: Hypers, step: Number) -> tuple[Tensor, States]:
    """Lion (arXiv:2302.06675)."""
    beta1, beta2 = h["betas"]
    blend = beta1 * s[0] + (1 - beta1) * g
    direction = torch.where(blend.isnan(), blend, blend.sign())
    p = p * (1 - h["lr"] * h["weight_decay"])
    return p - h["lr"] * direction, [beta2 * s[0] + (1 - beta2) * g]


def sgd(p: Tensor, g: Tensor, s: States, h: Hypers, step: Number) -> tuple[Tensor, States]:
    """Stochastic gradient descent, with momentum where there is a buffer."""
    g = _add_l2(g, p, h["weight_decay"])
    if not s:
        return _axpy(-h["lr"], g, p), []
    if isinstance(step, Tensor):
        weight: Number = torch.where(step <= 1, 1.0, 1.0 - h["dampening"])
    else:
        weight = 1.0 if step <= 1 else 1.0 - h["dampening"]
    buffer = _axpy(weight, g, h["momentum"] * s[0])
    g = _axpy(h["momentum"], buffer, g) if h["nesterov"] else buffer
    return _axpy(-h["lr"], g, p), [buffer]


def rmsprop(p: Tensor, g: Tensor, s: States, h: Hypers, step: Number) -> tuple[Tensor, States]:
    """RMSprop (Tieleman and Hinton 2012; centered: arXiv:1308.0850)."""
    g = _add_l2(g, p, h["weight_decay"])
    square_avg = s[0] * h["alpha"] + (1 - h["alpha"]) * g * g
    states = [square_avg]
    average = square_avg
    if h["centered"]:
        grad_avg = _lerp(s[1], g, 1 - h["alpha"])
        states.append(grad_avg)
        average = square_avg - grad_avg * grad_avg
    average = average.sqrt() + h["eps"]
    if len(s) == len(states):
        return p - h["lr"] * g / average, states
    buffer = h["momentum"] * s[-1] + g / average
    return _axpy(-h["lr"], buffer, p), [*states, buffer]


def adagrad(p: Tensor, g: Tensor, s: States, h: Hypers, step: Number) -> tuple[Tensor, States]:
    """Adagrad (Duchi et al. 2011)."""
    g = _add_l2(g, p, h["weight_decay"])
    total = s[0] + g * g
    lr = h["lr"] / (1 + (step - 1) * h["lr_decay"])
    return p - lr * g / (total.sqrt() + h["eps"]), [total]


def adadelta(p: Tensor, g: Tensor, s: States, h: Hypers, step: Number) -> tuple[Tensor, States]:
    """Adadelta (arXiv:1212.5701)."""
    g = _add_l2(g, p, h["weight_decay"])
    square_avg = s[0] * h["rho"] + (1 - h["rho"]) * g * g
    delta = (s[1] + h["eps"]).sqrt() / (square_avg + h["eps"]).sqrt() * g
    acc_delta = s[1] * h["rho"] + (1 - h["rho"]) * delta * delta
    return _axpy(-h["lr"], delta, p), [square_avg, acc_delta]


RuleFunction = Callable[[Tensor, Tensor, States, Hypers, Number], tuple[Tensor, States]]

FUNCTIONS: dict[str, RuleFunction] = {
    "adam": adam,
    "adam_amsgrad": adam,
    "lion": lion,
    "sgd": sgd,
    "sgd_momentum": sgd,
    "rmsprop": rmsprop,
    "rmsprop_momentum": rmsprop,
    "rmsprop_centered": rmsprop,
    "rmsprop_centered_momentum": rmsprop,
    "adagrad": adagrad,
    "adadelta": adadelta,
}


class Batch:
    """Parameters updated one by one in torch operations."""

    def __init__(self, optimizer: FusedOptimizer, device: torch.device, indices: Sequence[int]) -> None:
        self.optimizer = optimizer
        self.device = device
        members = list(optimizer._parameters())
        self.all = [param for _, _, param in members]
        self.members = [(index, *members[index]) for index in indices]
        self.wide = widest_float(device)
        self.row_values = torch.zeros((len(members), 2), dtype=self.wide, device=device)

    def refresh(self) -> bool:
        """Checks that the batch still holds; see :class:`fused.plan.Batch`."""
        live = [param for _, _, param in self.optimizer._parameters()]
        if len(live) != len(self.all) or any(a is not b for a, b in zip(live, self.all, strict=True)):
            return False
        for _, g, i, param in self.members:
            if local(param).device != self.device:
                return False
            self._check(self.optimizer.param_groups[g], i, param)
        if not torch.compiler.is_compiling():
            groups = self.optimizer.param_groups
            check_hypers(groups, [self.optimizer._rule(group).hypers for group in groups])
        return True

    def _check(self, group: dict[str, Any], i: int, param: Tensor) -> None:
        """Raises where a parameter cannot be stepped, before anything is changed."""
        check_row(self.optimizer, group, i, param)

    def reduce(self, norm_type: float) -> Tensor:
        """One pass over the gradients; see :class:`fused.plan.Batch`."""
        self.row_values = torch.zeros((len(self.all), 2), dtype=self.wide, device=self.device)
        for index, _, _, param in self.members:
            if param.grad is None or param.grad.numel() == 0:
                continue
            grad = real(local(param.grad.detach()))
            magnitude = grad.to(self.wide).abs()
            value = magnitude.amax() if norm_type == float("inf") else magnitude.square().sum()
            self.row_values[index] = torch.stack((value, (~grad.isfinite()).any().to(self.wide)))
        values, nonfinite = self.row_values.unbind(1)
        return torch.stack((values.amax() if norm_type == float("inf") else values.sum(), nonfinite.sum()))

    def compile_ahead(self) -> None:
        """Nothing: torch's operations are compiled; see :class:`fused.plan.Batch`."""

    def update(self, control: Control) -> None:
        """The optimizer step; see :class:`fused.plan.Batch`."""
        factor, skip = decide(control)
        if skip is not None and _readable(skip):
            if skip.item():
                for _, g, _, param in self.members:
                    if param.grad is not None:
                        state_storage.initialize(self.optimizer, self.optimizer.param_groups[g], param)
                return
            skip = None
        for index, g, _, param in self.members:
            if param.grad is not None:
                self._update_one(index, self.optimizer.param_groups[g], param, factor, skip, control.seed)

    def _update_one(
        self, index: int, group: dict[str, Any], param: Tensor, factor: Number, skip: Tensor | None, seed: int
    ) -> None:
        rule, storage = self.optimizer._rule(group), Storage.of(group)
        state = state_storage.initialize(self.optimizer, group, param)
        step = next_step(state, skip)
        operands = Operands(local(param), state, rule, storage, index, seed)
        p, grad = operands.load_param(), param.grad
        assert grad is not None
        g = real(local(grad).resolve_conj()).to(p.dtype)
        if group.get("maximize"):
            factor = -factor
        if isinstance(factor, Tensor):
            g = g * factor.to(g.dtype)  # a tensor without dimensions would be promoted to float64
        elif factor != 1:
            g = g * factor
        new_p, new_states = FUNCTIONS[rule.name](p, g, operands.load_states(), hypers_of(group, p), step)
        operands.store(new_p, new_states, step, skip)


def hypers_of(group: dict[str, Any], like: Tensor) -> Hypers:
    """The options of a parameter group, those in tensors without dimensions and on the parameter's device."""

    def there(value: Any) -> Any:
        if isinstance(value, Tensor):
            return _scalar(value, like.device)
        if isinstance(value, tuple | list) and any(isinstance(item, Tensor) for item in value):
            return tuple(there(item) for item in value)
        return value

    return {name: there(value) for name, value in group.items() if name != "params"}


def _scalar(value: Tensor, device: torch.device) -> Tensor:
    """A tensor of one element in float64, in which kernels derive constants: in float32, 1 - beta^step loses digits."""
    return value.reshape(()).to(device, widest_float(device))


def decide(control: Control) -> tuple[Number, Tensor | None]:
    """The factor of the gradients and whether to skip, as ``csrc/prologue.h`` has it."""
    factor: Number = control.grad_multiplier
    if control.grad_scale is not None:
        factor = factor / control.grad_scale.double()
    if control.unscale is not None:
        control.unscale.fill_(factor)
    skip = None if control.found_inf is None else control.found_inf.reshape(()) != 0
    if control.norm_total is not None:
        raw = control.norm_total[0] if control.norm_type == float("inf") else control.norm_total[0].sqrt()
        norm = raw * abs(factor)
        if control.grad_norm is not None:
            control.grad_norm.copy_(norm)
        if control.skip_nonfinite:
            nonfinite = control.norm_total[1] != 0
            skip = nonfinite if skip is None else skip | nonfinite
        if control.max_norm is not None and control.max_norm != float("inf"):
            factor = factor * (control.max_norm / (norm + 1e-6)).clamp(max=1.0)
    if control.skipped is not None:
        control.skipped.copy_(torch.zeros_like(control.skipped) if skip is None else skip)
    return factor, skip


def next_step(state: dict[str, Any], skip: Tensor | None) -> Number:
    """Counts the step, and returns the count: as a number where reading it costs nothing."""
    if "step" not in state:
        return 2.0  # a rule without a count has history: not the first step
    step: Tensor = state["step"]
    step += 1 if skip is None else (~skip).to(step.dtype)
    return step.item() if _readable(step) else step


def _readable(tensor: Tensor) -> bool:
    """Whether reading the value costs nothing."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and not isinstance(tensor, FakeTensor)


class Operands:
    """One parameter and its state, from storage to arithmetic and back."""

    def __init__(
        self, param: Tensor, state: dict[str, Any], rule: Rule, storage: Storage, index: int, seed: int
    ) -> None:
        self.param, self.state, self.rule, self.storage = param, state, rule, storage
        self.index, self.seed = index, seed

    def load_param(self) -> Tensor:
        """The parameter or its master in the arithmetic's dtype."""
        if state_storage.MASTER in self.state:
            return local(self.state[state_storage.MASTER])
        if state_storage.REMAINDER in self.state:
            return formats.join_master(self.param, local(self.state[state_storage.REMAINDER])).view(self.param.shape)
        return _wide(real(self.param))

    def load_states(self) -> States:
        """The rule's states in the arithmetic's dtype."""
        return [self._load_state(name) for name in self.rule.states]

    def _load_state(self, name: str) -> Tensor:
        value = local(self.state[name])
        if value.dtype != torch.uint8:
            return _wide(real(value))
        flat = state_storage.in_memory_order(value)
        scales = state_storage.scales_of(self.state, name)
        wide = formats.decode_blocks8(flat, scales, name not in self.rule.nonnegative)
        return wide.as_strided(value.shape, value.stride())

    def store(self, param: Tensor, states: States, step: Number, skip: Tensor | None) -> None:
        """Rounds and writes new values, master or remainder included; nothing changes where ``skip`` is true."""
        for k, (name, value) in enumerate(zip(self.rule.states, states, strict=True)):
            target = local(self.state[name])
            if target.dtype == torch.uint8:
                self._store_blocks8(name, target, value, step, skip)
            else:
                assign(real(target), self._rounded(value, target.dtype, 1 + k, step), skip)
        if state_storage.MASTER in self.state:
            assign(local(self.state[state_storage.MASTER]), param, skip)
            assign(self.param, param.to(self.param.dtype), skip)
        elif state_storage.REMAINDER in self.state:
            remainder = local(self.state[state_storage.REMAINDER])
            bits = remainder.element_size() * 8
            random = self._random(param, 0, step) if bits == 8 and self.storage.stochastic_rounding else None
            high, low = formats.split_master(param, self.param.dtype, bits, random)
            assign(self.param, high.view(param.shape), skip)
            assign(remainder, low.view(param.shape), skip)
        else:
            assign(real(self.param), self._rounded(param, self.param.dtype, 0, step), skip)

    def _rounded(self, value: Tensor, dtype: torch.dtype, operand: int, step: Number) -> Tensor:
        if not self.storage.stochastic_rounding or dtype not in (torch.bfloat16, torch.float16):
            return value if value.dtype == dtype or dtype.is_complex else value.to(dtype)
        return formats.round_stochastic(value, dtype, self._random(value, operand, step)).view(value.shape)

    def _random(self, value: Tensor, operand: int, step: Number) -> Tensor:
        """Random bits for the elements in memory order, shaped as ``value`` is seen."""
        flat = formats.random_bits(self.seed, self.index, operand, step, value.numel(), value.device)
        memory = torch.empty_like(value, dtype=torch.int64)
        state_storage.in_memory_order(memory).copy_(flat)
        return memory.contiguous()

    def _store_blocks8(self, name: str, target: Tensor, value: Tensor, step: Number, skip: Tensor | None) -> None:
        laid_out = torch.empty_like(target, dtype=torch.float32).copy_(value)
        codes, scales = formats.encode_blocks8(
            state_storage.in_memory_order(laid_out), name not in self.rule.nonnegative, step
        )
        assign(state_storage.in_memory_order(target), codes, skip)
        assign(state_storage.scales_of(self.state, name), scales, skip)


def _wide(tensor: Tensor) -> Tensor:
    wide = tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)
    # Under autograd the graph keeps what it was computed from, which the step is about to overwrite.
    return wide.clone() if wide is tensor and torch.is_grad_enabled() else wide


def assign(target: Tensor, value: Tensor, skip: Tensor | None) -> None:
    """Writes ``value`` unless ``skip``, a tensor that is not read on the host, is true."""
    target.copy_(value if skip is None else torch.where(skip, target, value.to(target.dtype)))
