"""Batches that are described to kernels by a table of addresses, kept from step to step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .. import state as state_storage
from ..optimizer import parameter_name
from ..plan import Control
from ..precision import FORMAT_OF_DTYPE, Format, Storage
from ..rules import MAY_BE_OFF, RULES, Hyper
from ..state import local, real
from ..validation import check_hypers, check_row
from . import extension
from .turns import span_of, turns_of

if TYPE_CHECKING:
    from ..optimizer import FusedOptimizer


class TableBatch:
    """Keeps the host table of one device in step with the live parameters, gradients and state.

    The table watches the plain cases itself (``csrc/host_table.cpp``); a row comes here only where something changed,
    or where it needs a copy in another layout: a parameter with gaps or overlaps between its elements, a gradient
    with other strides than its parameter. Such copies are made before the update and written back after it.
    """

    hypers_by_rule: Sequence[Sequence[Hyper]] = tuple(rule.hypers for rule in RULES.values())

    def __init__(self, optimizer: FusedOptimizer, device: torch.device, indices: list[int]) -> None:
        self.optimizer = optimizer
        self.device = device
        self.mine = frozenset(indices)
        self.members = [(g, i, param) for g, i, param in optimizer._parameters()]
        self.rules = [optimizer._rule(group) for group in optimizer.param_groups]
        self.rule_of_group = [rule.index for rule in self.rules]
        self.table = extension.HostTable(
            [[(*hyper, hyper in MAY_BE_OFF) for hyper in hypers] for hypers in self.hypers_by_rule]
        )
        self.table.resize(len(self.members), len(optimizer.param_groups))
        self.staged: dict[int, list[Tensor]] = {}
        self.write_back: list[tuple[Tensor, Tensor]] = []
        self.row_values = torch.zeros((len(self.members), 2), dtype=torch.float64, device=device)
        self.devices = [local(param).device for _, _, param in self.members]
        self.spans = [span_of(param) for _, _, param in self.members]
        self.turns = turns_of(self.spans)
        for index in range(len(self.members)):
            self._bind_unready(index)

    def refresh(self) -> bool:
        """Brings the table up to date; see :class:`fused.plan.Batch`."""
        attention = self.table.refresh(self.optimizer.param_groups, self.optimizer.state)
        if attention is None:
            return False
        if attention:
            if self._moved(attention):
                return False
            self.write_back.clear()
            mine = [index for index in attention if index in self.mine]
            for index in mine:
                self._check(index)
            self._check_capture(mine)
            for index in attention:
                if index in self.mine:
                    self._bind(index)
                else:
                    self._bind_unready(index)
        try:
            self.table.read_hypers(self.optimizer.param_groups, self.rule_of_group)
        except (TypeError, IndexError, ValueError, RuntimeError):
            check_hypers(self.optimizer.param_groups, [rule.hypers for rule in self.rules])
            raise
        return True

    def _moved(self, attention: Sequence[int]) -> bool:
        """Whether parameters lie where other batches are wanted: on another device, or in each other's memory."""
        moved = False
        for index in attention:
            param = self.members[index][2]
            if local(param).device != self.devices[index]:
                return True
            span = span_of(param)
            moved |= span != self.spans[index]
            self.spans[index] = span
        return moved and turns_of(self.spans) != self.turns

    def _bind_unready(self, index: int) -> None:
        """Describes a row without an update: of another batch, or before the first step."""
        foreign = index not in self.mine
        self.table.bind(index, self.members[index][2], foreign, None, {"foreign": foreign})

    def _finish(self) -> None:
        """After the update: write copies back, tell autograd."""
        for target, source in self.write_back:
            target.copy_(source)
        rest = self.table.bump_versions()
        if rest:
            increment_version(rest)

    def _name(self, index: int) -> str:
        g, i, _ = self.members[index]
        return parameter_name(self.optimizer.param_groups[g], i)

    def _check(self, index: int) -> None:
        """Raises where a row cannot be stepped, before anything is changed."""
        g, i, param = self.members[index]
        check_row(self.optimizer, self.optimizer.param_groups[g], i, param)
        if param.grad is not None:
            state = self.optimizer.state.get(param, {})
            for kind, tensor in (("parameter", param), ("gradient", param.grad), *state.items()):
                if isinstance(tensor, Tensor) and _is_freed(local(tensor)):
                    raise RuntimeError(f"the memory of '{kind}' of {self._name(index)} is freed: its storage is empty")

    def _check_capture(self, indices: Sequence[int]) -> None:
        """Raises where a graph would make state: anew, that is, whenever it is replayed."""
        if not capturing(self.device):
            return
        for index in indices:
            g, _, param = self.members[index]
            group, rule = self.optimizer.param_groups[g], self.rules[g]
            keeps = bool(rule.states) or self.optimizer._counts_steps(group) or Storage.of(group).master_weights
            if param.grad is not None and keeps and not self.optimizer.state.get(param):
                raise RuntimeError(
                    f"{self._name(index)} has no state yet, which a CUDA graph would make anew at every replay: "
                    "step once before capturing"
                )

    def _bind(self, index: int) -> None:
        """Describes one row to the table, initializing state where there is none."""
        g, _, param = self.members[index]
        group, rule = self.optimizer.param_groups[g], self.rules[g]
        self.staged.pop(index, None)
        # Whether a complex gradient is conjugated, as autograd leaves it, does not show in its address and strides.
        plain = not (makes_gradients(param) or param.is_complex() or is_traceable_wrapper_subclass(param))
        if param.grad is None:
            self.table.bind(index, param, plain, None, {})
            return
        state = state_storage.initialize(self.optimizer, group, param)
        storage = Storage.of(group)
        value, grad = real(local(param.detach())), local(param.grad.detach())
        if grad.is_conj() or grad.is_neg():
            plain = False
            grad = grad.resolve_conj().resolve_neg()
            self.staged.setdefault(index, []).append(grad)
        if makes_gradients(param):
            self.staged.setdefault(index, []).append(grad)
        grad = real(grad)
        dense = self._dense(index, value)
        direct = plain and dense is value
        if dense is not value:
            self.staged.setdefault(index, []).append(dense)
            self.write_back.append((value, dense))
        if not same_strides(grad, dense):
            direct = False
            grad = torch.empty_like(dense, dtype=grad.dtype).copy_(grad)
            self.staged.setdefault(index, []).append(grad)
        fields: dict[str, Any] = {
            "param": dense.data_ptr(),
            "grad": grad.data_ptr(),
            "numel": dense.numel(),
            "group": g,
            "stream": index,
            "rule": rule.index,
            "stochastic": storage.stochastic_rounding,
            "param_format": FORMAT_OF_DTYPE[dense.dtype],
            "grad_format": FORMAT_OF_DTYPE[grad.dtype],
        }
        if "step" in state:
            fields["step"] = state["step"].data_ptr()
        self._bind_master(fields, state, dense)
        fields["states"] = [
            self._state_fields(state, name, dense, name not in rule.nonnegative) for name in rule.states
        ]
        self._bind_more(index, state, dense)
        self.table.bind(index, param, direct, state, fields)

    def _dense(self, _index: int, value: Tensor) -> Tensor:
        """The parameter itself where kernels can take it as it lies in memory, else a copy that they can."""
        return value if is_dense(value) else torch.empty_like(value).copy_(value)

    def _bind_more(self, index: int, state: dict[str, Any], dense: Tensor) -> None:
        """Describes to a second table what the first has no place for."""

    def _bind_master(self, fields: dict[str, Any], state: dict[str, Any], dense: Tensor) -> None:
        for key in (state_storage.MASTER, state_storage.REMAINDER):
            if key in state:
                master = _laid_out(state, key, dense)
                fields["master"] = master.data_ptr()
                fields["master_format"] = {
                    torch.float32: Format.FLOAT32,
                    torch.int16: Format.REMAINDER16,
                    torch.int8: Format.REMAINDER8,
                }[master.dtype]

    def _state_fields(self, state: dict[str, Any], name: str, dense: Tensor, signed: bool) -> tuple[int, int, int]:
        value = _laid_out(state, name, dense)
        if value.dtype == torch.uint8:
            form = Format.BLOCK8_SIGNED if signed else Format.BLOCK8_UNSIGNED
            return value.data_ptr(), form, state_storage.scales_of(state, name).data_ptr()
        return value.data_ptr(), FORMAT_OF_DTYPE[value.dtype], 0

    def reduce(self, norm_type: float) -> Tensor:
        """One read of the gradients; see :class:`fused.plan.Batch`."""
        raise NotImplementedError

    def compile_ahead(self) -> None:
        """Nothing: the kernels are compiled; see :class:`fused.plan.Batch`."""

    def update(self, control: Control) -> None:
        """The optimizer step; see :class:`fused.plan.Batch`."""
        raise NotImplementedError


def capturing(device: torch.device) -> bool:
    """Whether what is launched on the device now goes into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _laid_out(state: dict[str, Any], name: str, dense: Tensor) -> Tensor:
    """A state tensor with the strides of its parameter, replaced in ``state`` by a copy where it has others."""
    value = real(local(state[name]))
    if same_strides(value, dense):
        return value
    copy = torch.empty_like(dense, dtype=value.dtype).copy_(value)
    if local(state[name]) is state[name]:
        state[name] = torch.view_as_complex(copy) if state[name].is_complex() else copy
    else:
        state[name]._local_tensor = copy
    return copy


def _is_freed(tensor: Tensor) -> bool:
    return tensor.numel() != 0 and tensor.untyped_storage().nbytes() == 0


def makes_gradients(param: Tensor) -> bool:
    """Whether a class has a property ``grad`` of its own, which may make a tensor that nobody else keeps."""
    return type(param).grad is not Tensor.grad


def same_strides(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape visit memory alike."""
    return all(
        size == 1 or left == right for size, left, right in zip(a.shape, a.stride(), b.stride(), strict=True)
    ) or a.numel() == 0


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements fill a range of memory without gaps or overlaps, in any order."""
    expected = 1
    for stride, size in sorted((st, sz) for st, sz in zip(tensor.stride(), tensor.shape, strict=True) if sz != 1):
        if stride != expected:
            return tensor.numel() == 0
        expected *= size
    return True
