"""What an optimizer and its parameters hold in memory, counted from the tensors themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.parameter import is_lazy

from .state import MASTER, REMAINDER, SCALE, local

if TYPE_CHECKING:
    from .optimizer import FusedOptimizer

PARAMETERS = "parameters"


@dataclass(frozen=True)
class Memory:
    """Bytes of parameters and optimizer state by kind, without gradients.

    Attributes:
        elements: number of parameters (elements, on this process).
        bytes_by_kind: ``"parameters"``, ``"master"`` or ``"remainder"``, every state under its key, its block scales
            under the key with ``_scale``, and ``"step"``.
    """

    elements: int
    bytes_by_kind: Mapping[str, int]

    @property
    def total(self) -> int:
        """Bytes of everything."""
        return sum(self.bytes_by_kind.values())

    @property
    def per_parameter(self) -> float:
        """Bytes per parameter of everything; 0 where there are no elements."""
        return self.total / self.elements if self.elements else 0.0

    def __str__(self) -> str:
        rows = [(kind, size) for kind, size in self.bytes_by_kind.items() if size]
        lines = [f"{'':<24}{'bytes':>16}{'per parameter':>16}"]
        lines += [self._line(kind, size) for kind, size in rows]
        return "\n".join([*lines, self._line("total", self.total)])

    def _line(self, kind: str, size: int) -> str:
        per_parameter = size / self.elements if self.elements else 0.0
        return f"{kind:<24}{size:>16,}{per_parameter:>16.4f}"


def measure(optimizer: FusedOptimizer) -> Memory:
    """Counts what ``optimizer``'s parameters and their state hold now; state comes into being with the first step."""
    kinds: dict[str, int] = {PARAMETERS: 0, MASTER: 0, REMAINDER: 0}
    elements = 0
    for _, _, param in optimizer._parameters():
        if is_lazy(param):
            continue
        elements += local(param).numel()
        kinds[PARAMETERS] += _bytes(param)
        for kind, tensor in _tensors(optimizer.state.get(param, {})):
            kinds[kind] = kinds.get(kind, 0) + _bytes(tensor)
    return Memory(elements, {kind: size for kind, size in kinds.items() if size or kind == PARAMETERS})


def _tensors(state: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """State tensors by key, block scales right after their state."""
    for name, value in state.items():
        if isinstance(value, Tensor) and not name.endswith(SCALE):
            yield name, value
            if isinstance(state.get(name + SCALE), Tensor):
                yield name + SCALE, state[name + SCALE]


def _bytes(tensor: Tensor) -> int:
    mine = local(tensor)
    return mine.numel() * mine.element_size()
