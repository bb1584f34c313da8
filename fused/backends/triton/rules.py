"""One small function per optimizer rule, in the order and with the arithmetic of ``csrc/rules.h``.

``<rule>_constants`` derives in float64, once per tensor and step, what the rule needs: it takes the hyperparameters in
the order of ``fused/rules.py`` and the step count, and returns eight numbers. ``<rule>`` updates elements in registers:
it takes parameter, gradient, the tuple of states and the constants, and returns the new parameter and states.

Divisions and square roots are correctly rounded and multiply-adds are fused only where they are written, so that the
bits are those of the other backends.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl


@triton.jit
def lerp(start, end, weight):
    """start + weight * (end - start), exact at both ends, as torch.lerp computes it."""
    low = weight < 0.5
    return tl.math.fma(tl.where(low, weight, weight - 1.0), end - start, tl.where(low, start, end))


@triton.jit
def _add_l2(g, p, l2):
    """Skipped at zero, so that an infinite parameter does not turn the gradient into NaN."""
    return tl.where(l2 != 0.0, tl.math.fma(l2, p, g), g)


@triton.jit
def sqrt(x):
    return tl.sqrt(x) if x.dtype == tl.float64 else tl.sqrt_rn(x)


@triton.jit
def div(x, y):
    return x / y if x.dtype == tl.float64 else tl.math.div_rn(x, y)


@triton.jit
def power(base, exponent):
    return tl.exp2(exponent * tl.log2(base))


@triton.jit
def adam_constants(lr, beta1, beta2, eps, weight_decay, decoupled, h6, h7, step):
    correction1 = 1.0 - power(beta1, step)
    correction2 = 1.0 - power(beta2, step)
    decay = tl.where(decoupled != 0.0, 1.0 - lr * weight_decay, 1.0)
    l2 = tl.where(decoupled != 0.0, 0.0, weight_decay)
    return decay, l2, 1.0 - beta1, beta2, 1.0 - beta2, tl.sqrt(correction2), eps, -(lr / correction1)


@triton.jit
def _adam_step(p, g, s, c, AMSGRAD: tl.constexpr):
    decay, l2, weight1, beta2, weight2, correction2_sqrt, eps, neg_step_size = c
    g = _add_l2(g, p, l2)
    p = p * decay
    exp_avg = lerp(s[0], g, weight1)
    exp_avg_sq = tl.math.fma(weight2 * g, g, beta2 * s[1])
    second = exp_avg_sq
    states = (exp_avg, exp_avg_sq)
    if AMSGRAD:
        second = tl.where((s[2] > exp_avg_sq) | (s[2] != s[2]), s[2], exp_avg_sq)
        states = (exp_avg, exp_avg_sq, second)
    step = neg_step_size * exp_avg  # ahead of the square root: one value less that stays over it
    return p + div(step, div(sqrt(second), correction2_sqrt) + eps), states


@triton.jit
def adam(p, g, s, c):
    return _adam_step(p, g, s, c, False)


@triton.jit
def adam_amsgrad(p, g, s, c):
    return _adam_step(p, g, s, c, True)


@triton.jit
def lion_constants(lr, beta1, beta2, weight_decay, h4, h5, h6, h7, step):
    zero = lr * 0.0
    return 1.0 - lr * weight_decay, beta1, 1.0 - beta1, beta2, 1.0 - beta2, -lr, zero, zero


@triton.jit
def lion(p, g, s, c):
    decay, beta1, weight1, beta2, weight2, neg_lr, _, _ = c
    blend = beta1 * s[0] + weight1 * g
    direction = tl.where(blend > 0.0, 1.0, tl.where(blend < 0.0, -1.0, blend))
    p = p * decay
    return p + neg_lr * direction, (beta2 * s[0] + weight2 * g,)


@triton.jit
def sgd_constants(lr, momentum, dampening, weight_decay, nesterov, h5, h6, h7, step):
    zero = lr * 0.0
    weight = tl.where(step <= 1.0, 1.0, 1.0 - dampening)
    return weight_decay, momentum, weight, nesterov, -lr, zero, zero, zero


@triton.jit
def sgd(p, g, s, c):
    l2, _, _, _, neg_lr, _, _, _ = c
    g = _add_l2(g, p, l2)
    return tl.math.fma(neg_lr + 0.0 * g, g, p), ()


@triton.jit
def sgd_momentum(p, g, s, c):
    l2, momentum, weight, nesterov, neg_lr, _, _, _ = c
    g = _add_l2(g, p, l2)
    buffer = tl.math.fma(weight, g, momentum * s[0])
    g = tl.where(nesterov != 0.0, tl.math.fma(momentum, buffer, g), buffer)
    return tl.math.fma(neg_lr, g, p), (buffer,)


@triton.jit
def rmsprop_constants(lr, alpha, eps, weight_decay, momentum, h5, h6, h7, step):
    zero = lr * 0.0
    return weight_decay, alpha, 1.0 - alpha, eps, momentum, -lr, zero, zero


@triton.jit
def _rmsprop_step(p, g, s, c, CENTERED: tl.constexpr, MOMENTUM: tl.constexpr):
    l2, alpha, weight, eps, momentum, neg_lr, _, _ = c
    g = _add_l2(g, p, l2)
    square_avg = tl.math.fma(weight * g, g, alpha * s[0])
    states = (square_avg,)
    average = square_avg
    if CENTERED:
        grad_avg = lerp(s[1], g, weight)
        average = tl.math.fma(-grad_avg, grad_avg, average)
        states = states + (grad_avg,)
    step = neg_lr * g  # ahead of the square root: one value less that stays over it
    average = sqrt(average) + eps
    if MOMENTUM:
        buffer = momentum * s[1 + CENTERED] + div(g, average)
        states = states + (buffer,)
        p = tl.math.fma(neg_lr, buffer, p)
    else:
        p = p + div(step, average)
    return p, states


@triton.jit
def rmsprop(p, g, s, c):
    return _rmsprop_step(p, g, s, c, False, False)


@triton.jit
def rmsprop_momentum(p, g, s, c):
    return _rmsprop_step(p, g, s, c, False, True)


@triton.jit
def rmsprop_centered(p, g, s, c):
    return _rmsprop_step(p, g, s, c, True, False)


@triton.jit
def rmsprop_centered_momentum(p, g, s, c):
    return _rmsprop_step(p, g, s, c, True, True)


@triton.jit
def adagrad_constants(lr, lr_decay, weight_decay, eps, h4, h5, h6, h7, step):
    zero = lr * 0.0
    return weight_decay, eps, -(lr / (1.0 + (step - 1.0) * lr_decay)), zero, zero, zero, zero, zero


@triton.jit
def adagrad(p, g, s, c):
    l2, eps, neg_lr, _, _, _, _, _ = c
    g = _add_l2(g, p, l2)
    total = tl.math.fma(g, g, s[0])
    return p + div(neg_lr * g, sqrt(total) + eps), (total,)


@triton.jit
def adadelta_constants(lr, rho, eps, weight_decay, h4, h5, h6, h7, step):
    zero = lr * 0.0
    return weight_decay, rho, 1.0 - rho, eps, -lr, zero, zero, zero


@triton.jit
def adadelta(p, g, s, c):
    l2, rho, weight, eps, neg_lr, _, _, _ = c
    g = _add_l2(g, p, l2)
    square_avg = tl.math.fma(weight * g, g, rho * s[0])
    delta = div(sqrt(s[1] + eps), sqrt(square_avg + eps)) * g
    acc_delta = tl.math.fma(weight * delta, delta, rho * s[1])
    return tl.math.fma(neg_lr, delta, p), (square_avg, acc_delta)


RULES: dict[str, tuple[Any, Any]] = {
    "adam": (adam_constants, adam),
    "adam_amsgrad": (adam_constants, adam_amsgrad),
    "lion": (lion_constants, lion),
    "sgd": (sgd_constants, sgd),
    "sgd_momentum": (sgd_constants, sgd_momentum),
    "rmsprop": (rmsprop_constants, rmsprop),
    "rmsprop_momentum": (rmsprop_constants, rmsprop_momentum),
    "rmsprop_centered": (rmsprop_constants, rmsprop_centered),
    "rmsprop_centered_momentum": (rmsprop_constants, rmsprop_centered_momentum),
    "adagrad": (adagrad_constants, adagrad),
    "adadelta": (adadelta_constants, adadelta),
}
"""``(constants, apply)`` of every rule."""
