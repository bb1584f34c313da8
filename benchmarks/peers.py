"""Third-party systems. Each is asked for the nearest thing it has to a case; what it lacks it says.

None is needed: a system that is not importable shows as "not installed". `pip install '.[compare]'` gets those that
pip can install.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .cases import Case, Precision
from .problem import NotAvailable, Problem, Side
from .systems import Options, System, register

Builder = Callable[[Case, Precision, list[Tensor]], Any]


def _peer(
    key: str, title: str, package: str, module: str, gpu: bool | None = None, compiles: bool = False
) -> Callable[[Builder], Builder]:
    """Register a function that builds the peer's optimizer. `gpu`: True where it needs one, False: the CPU only."""

    def decorate(make: Builder) -> Builder:
        def build(case: Case, problem: Problem, options: Options) -> Side:
            if gpu is not None and gpu != (problem.device.type == "cuda"):
                raise NotAvailable("GPU only" if gpu else "CPU only")
            if options.groups > 1:
                raise NotAvailable("measured with one group only")
            params = problem.parameters()
            note = "no masters" if problem.precision.master and key not in _WITH_MASTERS else ""
            try:
                optimizer = make(case, problem.precision, params)
            except (
                ImportError,
                NotImplementedError,
                RuntimeError,
                ValueError,
                TypeError,
                AttributeError,
                OSError,
            ) as error:
                text = (str(error).splitlines() or [""])[0][:100]
                raise NotAvailable(f"{type(error).__name__}: {text}") from None
            return Side(key, title, params, optimizer.step, optimizer, note=note)

        register(System(key, title, build, package, module, compiles))
        return make

    return decorate


_WITH_MASTERS = {"flashoptim", "transformer-engine", "apex"}


def _lacks(case: Case) -> NotAvailable:
    return NotAvailable(f"no {case.cls} like this")


def _check_states(precision: Precision, *supported: str) -> None:
    if precision.state_name not in supported:
        raise NotAvailable(f"no {precision.state_name} states")


def _plain_adam(case: Case) -> dict[str, Any]:
    if case.key not in ("adam", "adamw"):
        raise _lacks(case)
    return dict(case.kwargs)


@_peer("bitsandbytes", "bitsandbytes", "bitsandbytes", "bitsandbytes")
def _bitsandbytes(case: Case, precision: Precision, params: list[Tensor]) -> Any:
    import bitsandbytes

    # its 32-bit classes keep float32 states whatever the parameter, its 8-bit classes blockwise codes
    suffix = "8bit" if precision.state_name == "int8" else ""
    if case.key not in ("adamw", "adam", "lion", "sgd", "rmsprop", "adagrad"):
        raise _lacks(case)
    return getattr(bitsandbytes.optim, case.cls + suffix)(params, **case.kwargs)


@_peer("torchao", "torchao", "torchao", "torchao", compiles=True)
def _torchao(case: Case, precision: Precision, params: list[Tensor]) -> Any:
    from torchao import optim

    kwargs = _plain_adam(case)
    if precision.state_name == "int8":
        return getattr(optim, case.cls + "8bit")(params, bf16_stochastic_round=precision.stochastic, **kwargs)
    if case.key != "adamw":
        raise _lacks(case)
    return optim._AdamW(params, bf16_stochastic_round=precision.stochastic, **kwargs)


@_peer("flashoptim", "FlashOptim", "flashoptim", "flashoptim", gpu=True)
def _flashoptim(case: Case, precision: Precision, params: list[Tensor]) -> Any:
    import flashoptim

    if case.key not in ("adamw", "adam", "lion", "sgd"):
        raise _lacks(case)
    bits = {None: None, "split": 32, "split8": 24, "fp32": 32}[precision.master]
    return getattr(flashoptim, "Flash" + case.cls)(
        params, quantize=precision.state_name == "int8", master_weight_bits=bits, **case.kwargs
    )


@_peer("optimi", "optimi", "torch-optimi", "optimi")
def _optimi(case: Case, precision: Precision, params: list[Tensor]) -> Any:
    import optimi

    _check_states(precision, "fp32", "bf16")
    if case.key not in ("adamw", "adam", "lion", "sgd"):
        raise _lacks(case)
    kwargs = dict(case.kwargs)
    if case.key == "sgd":  # torch's SGD has no dampening by default and coupled decay; optimi's is decoupled
        kwargs["dampening"] = False
    kahan = precision.param == "bf16"  # its answer to lost low-order bits: one more bf16 number
    foreach = params[0].device.type == "cpu" or None  # on a GPU its own choice, Triton
    return getattr(optimi, case.cls)(params, kahan_sum=kahan, foreach=foreach, **kwargs)


@_peer("lion-pytorch", "lion-pytorch", "lion-pytorch", "lion_pytorch")
def _lion_pytorch(case: Case, precision: Precision, params: list[Tensor]) -> Any:
    from lion_pytorch import Lion

    _check_states(precision, "fp32", "bf16", "fp16")
    if case.key != "lion":
        raise _lacks(case)
    return Lion(params, **case.kwargs)


@_peer("transformers", "transformers", "transformers", "transformers")
def _transformers(case: Case, _precision: Precision, params: list[Tensor]) -> Any:
    if case.key != "adafactor":
        raise _lacks(case)
    from transformers.optimization import Adafactor

    return Adafactor(params, relative_step=False, warmup_init=False, scale_parameter=True, **case.kwargs)


_STALE = 600.0  # seconds: no compilation of theirs takes as long


def _compiling() -> None:
    """DeepSpeed compiles its kernels at first use, with the ninja on PATH: this environment's, if it has one.

    A compilation that was killed leaves a lock, for which the next one would wait for ever.
    """
    here = str(Path(sys.executable).parent)
    if here not in os.environ["PATH"].split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([here, os.environ["PATH"]])
    from torch.utils import cpp_extension

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root())
    for lock in root.glob("**/lock"):
        if time.time() - lock.stat().st_mtime > _STALE:
            raise NotAvailable(f"a compilation that was killed has left {lock}: remove it")


@_peer("deepspeed-cpu", "DeepSpeed CPU", "deepspeed", "deepspeed", gpu=False, compiles=True)
def _deepspeed_cpu(case: Case, precision: Precision, params: list[Tensor]) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    _compiling()
    _check_states(precision, "fp32", "bf16", "fp16")
    kwargs = dict(case.kwargs)
    if case.key in ("adam", "adamw"):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(params, adamw_mode=case.key == "adamw", **kwargs)
    if case.key == "lion":
        from deepspeed.ops.lion import DeepSpeedCPULion

        return DeepSpeedCPULion(params, **kwargs)
    if case.key == "adagrad":
        from deepspeed.ops.adagrad import DeepSpeedCPUAdagrad

        return DeepSpeedCPUAdagrad(params, **kwargs)
    raise _lacks(case)


@_peer("deepspeed", "DeepSpeed Fused", "deepspeed", "deepspeed", gpu=True, compiles=True)
def _deepspeed(case: Case, precision: Precision, params: list[Tensor]) -> Any:
    _compiling()
    _check_states(precision, "fp32", "bf16", "fp16")
    if case.key in ("adam", "adamw"):
        from deepspeed.ops.adam import FusedAdam

        return FusedAdam(params, adam_w_mode=case.key == "adamw", **case.kwargs)
    if case.key == "lion":
        from deepspeed.ops.lion import FusedLion

        return FusedLion(params, **case.kwargs)
    raise _lacks(case)


@_peer("apex", "apex", "apex", "apex", gpu=True)
def _apex(case: Case, precision: Precision, params: list[Tensor]) -> Any:
    from apex import optimizers

    _check_states(precision, "fp32", "bf16", "fp16")
    kwargs = dict(case.kwargs)
    if case.key in ("adam", "adamw"):
        return optimizers.FusedAdam(params, adam_w_mode=case.key == "adamw", **kwargs)
    if case.key in ("sgd", "adagrad"):
        return getattr(optimizers, "Fused" + case.cls)(params, **kwargs)
    raise _lacks(case)


@_peer("transformer-engine", "Transformer Engine", "transformer-engine", "transformer_engine", gpu=True)
def _transformer_engine(case: Case, precision: Precision, params: list[Tensor]) -> Any:
    from transformer_engine.pytorch import optimizers

    kwargs = dict(case.kwargs)
    if case.key == "sgd":
        return optimizers.FusedSGD(params, **kwargs)
    if case.key not in ("adam", "adamw"):
        raise _lacks(case)
    _check_states(precision, "fp32", "bf16", "fp16")
    if precision.master:
        kwargs |= {"master_weights": True, "store_param_remainders": precision.master == "split"}
    state = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision.state_name]
    kwargs |= {"exp_avg_dtype": state, "exp_avg_sq_dtype": state}
    return optimizers.FusedAdam(params, adam_w_mode=case.key == "adamw", **kwargs)
