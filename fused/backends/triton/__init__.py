"""The Triton kernels: the whole step in a fixed number of launches, on any GPU that Triton serves, without a compiler.

Launches per step: a prologue per distinct rule and an update per distinct combination of rule and formats; before them,
with clipping or ``skip_nonfinite``, as many reads of the gradients. A model of one dtype takes 2, with clipping 3,
whatever the number of its tensors and groups. Tables travel to the device only where something in them changed; nothing
is allocated, read back or waited for once they stand, so a step can be captured into a CUDA graph.
"""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from ...plan import Control
from ...precision import FORMAT_OF_DTYPE, Format, Storage
from ...rules import Rule
from ..table import TableBatch, capturing
from . import adafactor, kernels
from .launch import Launcher
from .rules import RULES as FUNCTIONS
from .storage import GROUP_WORDS, ROW_WORDS

if TYPE_CHECKING:
    from ...optimizer import FusedOptimizer

_log = logging.getLogger("fused")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CHUNK = 1024
"""Elements per program: four 128-bit accesses per thread and operand with float32."""
NUM_WARPS = 4
_HYPERS = 8
ALIGNMENT = 16
# Byte offsets within a row, after its 64-bit words: see TensorRow in csrc/table.h.
_BYTES = 14 * 8
_TAGS = 9
_announced = False


@dataclass(frozen=True)
class Formats:
    """What an update launch is compiled for."""

    rule: str
    stochastic: bool
    param: int
    grad: int
    master: int
    states: tuple[int, ...]


@dataclass
class Launch:
    """The chunks of all tensors of one combination of rule and formats, and the kernels that take them."""

    formats: Formats
    rows: Tensor
    starts: Tensor
    launchers: dict[Any, Launcher] = field(default_factory=dict, kw_only=True)


class Batch(TableBatch):
    """Parameters on one GPU.

    A graph reads tables in every replay. What it has seen is never written to again: later steps use other tables.
    """

    tables: tuple[str, ...] = ("rows", "groups", "scalars", "launches", "members_of_rule", "partials", "counters")

    def __init__(self, optimizer: FusedOptimizer, device: torch.device, indices: list[int]) -> None:
        super().__init__(optimizer, device, indices)
        count, groups = len(self.members), len(optimizer.param_groups)

        def zeros(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        self.generation = -1
        self.rows = zeros(count, ROW_WORDS, dtype=torch.int64)
        self.groups = zeros(groups, GROUP_WORDS, dtype=torch.int64)
        self.live_groups = b""
        self.table.read_on_device(*_dlpack_device(device))
        self.constants, self.factors, self.steps = zeros(count, _HYPERS), zeros(count), zeros(count)
        self.skip = zeros(1, dtype=torch.int32)
        self.counters = zeros(count + 1, dtype=torch.int32)
        self.live_rows = 0
        self.total, self.scalars = zeros(2), zeros(2)
        self.live_scalars: tuple[float, float] | None = None
        self.scratch = zeros(2, dtype=torch.float32)
        self.partials = zeros(0)
        self.divided: Tensor | None = None
        self.launches: list[Launch] = []
        self.members_of_rule: dict[str, Tensor] = {}
        self.prologues: dict[tuple[str, int], Launcher] = {}
        self.ahead = False
        self.seen: set[str] = set()  # attributes of which a graph reads what they hold now
        self.fleeting = False  # something was uploaded by a graph: it is there in the graph's replays only
        self.retired: list[Any] = []  # what graphs read

    # ---- tables ----

    def refresh(self) -> bool:
        """Brings the tables up to date, the device's too; see :class:`fused.plan.Batch`."""
        if not super().refresh():
            return False
        if self.fleeting:
            self._forget()
        if self.table.generation != self.generation:
            self.generation = self.table.generation
            self._upload_rows()
        self._upload_groups()
        return True

    def _forget(self) -> None:
        """Has everything uploaded again, to other places."""
        self.fleeting = False
        self.generation, self.divided, self.live_groups, self.live_scalars = -1, None, b"", None
        self._make_room("partials", 0)
        self._make_room("counters", len(self.counters))

    def _replace(self, name: str, value: Any) -> None:
        """What a graph reads stays as it is, for as long as the optimizer lives."""
        if name in self.seen:
            self.retired.append(getattr(self, name))
            self.seen.discard(name)
        setattr(self, name, value)

    def _make_room(self, name: str, count: int) -> None:
        """A new tensor of zeros."""
        self._replace(name, torch.zeros(count, dtype=getattr(self, name).dtype, device=self.device))

    def _upload(self, name: str, values: Tensor) -> None:
        """Into a table: the one that is there, unless a graph reads that."""
        if name in self.seen or capturing(self.device):
            self._replace(name, torch.empty_like(getattr(self, name)))
        self._to_device(getattr(self, name), values)

    def _to_device(self, target: Tensor, values: Tensor) -> None:
        """Copies without waiting, from a new pinned copy each time: a captured graph reads it on every replay."""
        in_graph = capturing(self.device)
        self.fleeting |= in_graph
        if target.is_cuda and values.numel():
            values = values.pin_memory()
            if in_graph:  # elsewhere torch's pinned allocator keeps a block until the copy from it has run
                self.optimizer.__dict__.setdefault("_pinned", []).append(values)
        target.copy_(values.view(target.shape), non_blocking=True)

    def _on_device(self, values: Tensor) -> Tensor:
        target = torch.empty_like(values, device=self.device)
        self._to_device(target, values)
        return target

    def _upload_rows(self) -> None:
        """Addresses travel whenever one has changed; how the work is divided, where something else has."""
        raw = bytearray(self.table.row_bytes())
        count = len(self.members)
        words = torch.frombuffer(raw, dtype=torch.int64).view(count, ROW_WORDS)
        tags = torch.frombuffer(raw, dtype=torch.uint8).view(count, ROW_WORDS * 8)[:, _BYTES : _BYTES + _TAGS]
        self._upload("rows", words)
        active = words[:, 1] != 0
        flags = torch.stack((active, aligned(words)), 1).to(torch.int64)
        divided = torch.cat((flags, words[:, 12:14], tags.to(torch.int64)), 1)
        if self.divided is None or not torch.equal(divided, self.divided):
            self.divided = divided
            self.row_values.zero_()  # of a row that lost its gradient nothing may stay
            self._divide(words, self._classes(active.tolist(), tags.tolist()))

    def _classes(self, active: list[bool], tags: list[list[int]]) -> dict[Formats, list[int]]:
        """The rows of each combination of rule and formats."""
        classes: dict[Formats, list[int]] = {}
        for index, (_, stochastic, param, grad, master, *states) in enumerate(tags):
            if active[index] and index in self.mine:
                rule = self.rules[self.members[index][0]]
                key = Formats(rule.name, bool(stochastic), param, grad, master, tuple(states[: len(rule.states)]))
                classes.setdefault(key, []).append(index)
        return classes

    def _divide(self, words: Tensor, classes: dict[Formats, list[int]]) -> None:
        """Lists the work of every launch."""
        self._replace("launches", [self._launch(formats, words, indices) for formats, indices in classes.items()])
        by_rule: dict[str, list[int]] = {}
        for formats, indices in classes.items():
            by_rule.setdefault(formats.rule, []).extend(indices)
        members = {name: self._on_device(torch.tensor(indices, dtype=torch.int64)) for name, indices in by_rule.items()}
        self._replace("members_of_rule", members)
        chunks = sum(launch.rows.numel() for launch in self.launches)
        self.live_rows = sum(int(words[index, 12]) > 0 for indices in classes.values() for index in indices)
        if self.partials.numel() < 2 * chunks:
            self._make_room("partials", 2 * chunks)

    def _launch(self, formats: Formats, words: Tensor, indices: list[int]) -> Launch:
        members = torch.tensor(indices, dtype=torch.int64)
        numel = words[members, 12]
        counts = (numel + CHUNK - 1) // CHUNK
        owner = torch.repeat_interleave(torch.arange(len(indices)), counts)
        first = torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        starts = (torch.arange(int(counts.sum())) - first) * CHUNK
        full = aligned(words[members])[owner] & (starts + CHUNK <= numel[owner])
        rows = members[owner] * 2 + full
        return Launch(formats, self._on_device(rows), self._on_device(starts))

    def _upload_groups(self) -> None:
        """Hyperparameters that are numbers travel where they changed; tensors on this device are read by address."""
        raw = self.table.group_bytes()
        if raw != self.live_groups:
            self.live_groups = raw
            self._upload("groups", torch.frombuffer(bytearray(raw), dtype=torch.int64))

    # ---- the step ----

    def reduce(self, norm_type: float) -> Tensor:
        """One read of the gradients; see :class:`fused.plan.Batch`."""
        if self.live_rows == 0:
            return self.total.zero_()
        maximum = norm_type == float("inf")
        first = 0
        with self._current():
            for launch in self.launches:
                chunks = launch.rows.numel()
                if chunks:
                    self._run(
                        launch.launchers, maximum, kernels.reduce,
                        {"MAXIMUM": maximum, "GRAD_FORMAT": launch.formats.grad, "BLOCK": CHUNK, "LANES": 1024},
                        chunks, self.rows, launch.rows, launch.starts, first, self.partials, self.row_values,
                        len(self.members), self.counters, self.live_rows, self.total,
                    )  # fmt: skip
                first += chunks
        return self.total

    def compile_ahead(self) -> None:
        """Compiles the kernels of the coming steps; see :func:`fused.warmup`."""
        classes: dict[Formats, list[int]] = {}
        for index in sorted(self.mine):
            group, _, param = self.members[index]
            if param.dtype not in FORMAT_OF_DTYPE:
                continue  # the step says what is wrong with it
            classes.setdefault(_coming(self.rules[group], self.optimizer.param_groups[group], param), []).append(index)
        one = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.launches = [self._launch_ahead(formats, one) for formats in classes]
        self.members_of_rule = {formats.rule: one for formats in classes}
        self.live_rows = len(self.mine)
        options = self.optimizer._options
        control = Control(options["max_grad_norm"], options["norm_type"], options["skip_nonfinite"], options["seed"])
        self.ahead = True
        if control.max_norm is not None or control.skip_nonfinite:
            control.grad_norm, control.skipped = self.scratch.unbind()
            control.unscale = self.total[1]
            control.norm_total = self.reduce(control.norm_type)
        self._launch_all(control)

    def _launch_ahead(self, formats: Formats, one: Tensor) -> Launch:
        return Launch(formats, one, one)

    def _current(self) -> Any:
        """Makes this device the current one, where it is not."""
        if self.device.type == "cpu" or self.device.index == torch.cuda.current_device():
            return contextlib.nullcontext()
        return torch.cuda.device(self.device)

    def _run(
        self,
        launchers: dict[Any, Launcher],
        key: Any,
        kernel: Any,
        constants: dict[str, Any],
        programs: int,
        *args: Any,
    ) -> None:
        """Launches a kernel, or only compiles it; ``key`` tells those of ``launchers`` apart."""
        launcher = launchers.get(key)
        if launcher is None:
            options = options_of(kernel, nvidia=self.device.type == "cuda" and torch.version.hip is None)
            launcher = launchers[key] = Launcher(kernel, self.device, constants, options)
        if self.ahead:
            launcher.compile(*args)
        else:
            launcher(programs, *args)

    def update(self, control: Control) -> None:
        """The optimizer step; see :class:`fused.plan.Batch`."""
        with self._current():
            self._launch_all(control)
        if capturing(self.device):
            # A graph reads these tables whenever it is replayed: they live as long as the optimizer.
            self.seen.update(self.tables)
            self.optimizer.__dict__.setdefault("_captured_tables", set()).add(self)
        self._finish()

    def _launch_all(self, control: Control) -> None:
        announce()
        self._upload_scalars(control)
        for name in self.members_of_rule:
            self._prologue(name, control)
        for launch in self.launches:
            if launch.rows.numel():
                self._update(launch, control.seed)

    def _upload_scalars(self, control: Control) -> None:
        scalars = (control.grad_multiplier, -1.0 if control.max_norm is None else control.max_norm)
        if scalars != self.live_scalars:
            self.live_scalars = scalars
            self._upload("scalars", torch.tensor(scalars, dtype=torch.float64))

    def _pointers(self, control: Control) -> tuple[int, list[Tensor]]:
        """What a step's control asks for, as bits, and the tensors it names, in the order of the kernels' arguments."""
        named = (
            (control.norm_total, kernels.HAS_NORM), (control.grad_scale, kernels.HAS_SCALE),
            (control.found_inf, kernels.HAS_FOUND_INF), (control.grad_norm, kernels.HAS_GRAD_NORM),
            (control.skipped, kernels.HAS_SKIPPED), (control.unscale, kernels.HAS_UNSCALE),
        )  # fmt: skip
        bits = sum(bit.value for tensor, bit in named if tensor is not None)
        bits |= kernels.NORM_IS_MAX.value * (control.norm_type == float("inf"))
        bits |= kernels.SKIP_NONFINITE.value * control.skip_nonfinite
        bits |= kernels.CLIP.value * (control.max_norm is not None)
        return bits, [self.scratch if tensor is None else tensor for tensor, _ in named]

    def _prologue(self, name: str, control: Control) -> None:
        members = self.members_of_rule[name]
        bits, pointers = self._pointers(control)
        self._run(
            self.prologues, (name, bits), kernels.prologue,
            {"CONSTANTS": FUNCTIONS[name][0], "CONTROL": bits, "BLOCK": 128},
            triton.cdiv(members.numel(), 128),
            self.rows, members, members.numel(), self.groups, self.constants, self.factors, self.steps, self.skip,
            self.scalars, *pointers,
        )  # fmt: skip

    def _update(self, launch: Launch, seed: int) -> None:
        formats = launch.formats
        self._run(
            launch.launchers, "update", kernels.update,
            {
                "RULE": FUNCTIONS[formats.rule][1], "STATES": len(formats.states), "PARAM_FORMAT": formats.param,
                "GRAD_FORMAT": formats.grad, "MASTER_FORMAT": formats.master, "STATE_FORMATS": formats.states,
                "STOCHASTIC": formats.stochastic, "BLOCK": CHUNK,
            },
            launch.rows.numel(),
            self.rows, launch.rows, launch.starts, self.constants, self.factors, self.steps, self.skip,
            signed_seed(seed),
        )  # fmt: skip


def options_of(kernel: Any, nvidia: bool) -> dict[str, Any]:
    """What a kernel is compiled with. A few registers more than ptxas aims at spare `stats` local memory."""
    options = {"num_warps": NUM_WARPS, "enable_fp_fusion": False}
    return {**options, "maxnreg": 152} if nvidia and kernel is adafactor.stats else options


def signed_seed(seed: int) -> int:
    """The bits of a 64-bit seed as the signed number that kernels take."""
    return seed if seed < 1 << 63 else seed - (1 << 64)


def aligned(words: Tensor) -> Tensor:
    """Of rows as words: whether parameter, gradient, master and states lie on multiples of 16 bytes."""
    return (words[:, :7] % ALIGNMENT == 0).all(1)


_MASTER = {None: Format.NONE, "fp32": Format.FLOAT32, "split": Format.REMAINDER16, "split8": Format.REMAINDER8}


def _coming(rule: Rule, group: dict[str, Any], param: Tensor) -> Formats:
    """What an update of a parameter will be compiled for, before there is state or a gradient."""
    storage = Storage.of(group)
    form = FORMAT_OF_DTYPE[param.dtype]
    grad = form if param.grad is None else FORMAT_OF_DTYPE[param.grad.dtype]
    master = _MASTER[storage.master_weights]
    # plain numbers, as the table's: Triton tells them from an enumeration's
    states = tuple(int(_state_format(storage.dtype_of_state(param), name in rule.nonnegative)) for name in rule.states)
    return Formats(rule.name, storage.stochastic_rounding, int(form), int(grad), int(master), states)


def _state_format(dtype: torch.dtype, nonnegative: bool) -> Format:
    if dtype == torch.uint8:
        return Format.BLOCK8_UNSIGNED if nonnegative else Format.BLOCK8_SIGNED
    return FORMAT_OF_DTYPE[dtype]


def _dlpack_device(device: torch.device) -> tuple[int, int]:
    """Type and index of a device in DLPack's numbering: 1 CPU, 2 CUDA, 10 ROCm."""
    if device.type == "cpu":
        return 1, 0
    index = torch.cuda.current_device() if device.index is None else device.index
    return 2 if torch.version.hip is None else 10, index


def announce() -> None:
    """Says once that compilation is under way."""
    global _announced
    if not _announced and not INTERPRETED:
        _announced = True
        _log.info("compiling Triton kernels for the first step (cached on disk for the next run)")


__all__ = ["CHUNK", "NUM_WARPS", "Batch", "Format", "Formats", "Launch"]
