"""Adafactor's Triton kernels: the whole model in three launches, four with clipping or ``skip_nonfinite``.

Averages of the squares, squares of the updates (not where ``d=None`` or nothing is factored), updates; before them,
with clipping or ``skip_nonfinite``, one read of the gradients. The first launch decides and counts the step. Each is
there once per distinct combination of formats. Nothing is allocated, read back or waited for once the tables stand.

Sums are kept per tile: about 0.05 bytes per element of a large matrix, freed with the optimizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..plan import Control
from . import triton
from .factored_table import FactoredBatch
from .triton import adafactor as kernels
from .triton import signed_seed
from .triton.storage import FLOAT64

if TYPE_CHECKING:
    from ..optimizer import FusedOptimizer

SMALL = 32
"""Matrices with no more rows and columns than that are taken whole."""
NARROW = 64
"""Matrices with no more columns are taken in tiles of all of them."""
LEAST_ROUNDS = 32
"""Iterations of a tile of a matrix, so that sums by column are few beside the elements."""
MOST_TILES = 256
"""Above one another in a matrix, so that what combines them does not take long."""
_WORD = 8


@dataclass(frozen=True)
class Tiling:
    """How one tensor is divided. Fixed by its shape, format and alignment, so results are the same every time.

    Attributes:
        kind: of the tiles of `stats`, as in ``triton/adafactor.py``.
        lines: of a tile of a matrix; matrices in a tile of small ones.
        down: tiles of a matrix above one another.
        across: tiles of a matrix side by side.
        tiles: of the tensor.
        spans: of the tensor, which `norm` and `apply` take.
        full: spans in the order of memory that need no mask, before those that do.
        matrix: whether spans are parts of matrices, with whole 16-byte words in every line.
    """

    kind: int
    lines: int
    down: int
    across: int
    tiles: int
    spans: int
    full: int
    matrix: bool


def tiling_of(numel: int, matrices: tuple[int, int, int] | None, aligned: bool) -> Tiling:
    """Divides a tensor of ``matrices`` (their number, rows and columns), or without; ``aligned`` to 16 bytes."""
    span = kernels.SPAN.value
    full = numel // span if aligned else 0
    spans = -(-numel // span)
    if matrices is None or numel == 0:
        return Tiling(kernels.FLAT.value, 0, 0, 0, max(spans, 1), spans, full, False)
    lead, rows, cols = matrices
    whole_words = aligned and cols % 32 == 0
    matrix = whole_words and cols >= kernels.MATRIX_WIDTH.value
    if matrix:
        spans = lead * -(-rows // (kernels.ROUNDS.value * kernels.MATRIX_LINES.value))
        spans *= -(-cols // kernels.MATRIX_WIDTH.value)
    if max(rows, cols) <= SMALL:
        together = max(1, span // (rows * cols))
        return Tiling(kernels.SMALL.value, together, 0, 0, -(-lead // together), spans, full, matrix)
    if whole_words and cols > NARROW:
        kind, height, width = kernels.WIDE, kernels.WIDE_LINES, kernels.WIDE_WIDTH
    else:
        kind, height, width = kernels.NARROW, kernels.NARROW_LINES, kernels.NARROW_WIDTH
    step = LEAST_ROUNDS * height.value
    lines = step * -(-rows // (step * MOST_TILES))
    down, across = -(-rows // lines), -(-cols // width.value)
    return Tiling(kind.value, lines, down, across, lead * down * across, spans, full, matrix)


class Shapes:
    """What the kernels know of each tensor beside its row, on the host."""

    def __init__(self, count: int) -> None:
        self.words = torch.zeros(count, kernels.SHAPE_WORDS, dtype=torch.int64)

    def bind(
        self, index: int, row_var: int, col_var: int, variance: int, lead: int, rows: int, cols: int, flags: int
    ) -> None:
        """Where a tensor's second moment lies, as ``FactoredRow`` in ``csrc/table.h``."""
        self.words[index, :7] = torch.tensor((row_var, col_var, variance, lead, rows, cols, flags))

    def matrices(self, index: int) -> tuple[int, int, int] | None:
        """Number, rows and columns of the matrices of a tensor that is factored."""
        row_var, col_var, variance, lead, rows, cols = self.words[index, :6].tolist()
        return None if variance or not (row_var or col_var) else (lead, rows, cols)


@dataclass
class Launch(triton.Launch):
    """With the work of Adafactor's kernels: pairs of ``row * 8 + kind`` and the number within the tensor."""

    tiles: Tensor
    factored: Tensor
    spans: Tensor


class Batch(FactoredBatch, triton.Batch):
    """Parameters on one GPU."""

    tables = (*triton.Batch.tables, "shapes", "sums", "arrivals")

    def __init__(self, optimizer: FusedOptimizer, device: torch.device, indices: list[int]) -> None:
        super().__init__(optimizer, device, indices)
        self.factored = Shapes(len(self.members))
        self.live_shapes = torch.zeros_like(self.factored.words)
        self.shapes = torch.zeros_like(self.factored.words, device=device)
        self.sums = torch.zeros(0, dtype=torch.float64, device=device)
        self.arrivals = torch.zeros(0, dtype=torch.int32, device=device)

    # ---- tables ----

    def _forget(self) -> None:
        super()._forget()
        self.live_shapes.zero_()
        self._make_room("sums", 0)
        self._make_room("arrivals", 0)

    def _upload_rows(self) -> None:
        super()._upload_rows()
        if not torch.equal(self.factored.words, self.live_shapes):
            self.live_shapes = self.factored.words.clone()
            self._upload("shapes", self.live_shapes)

    def _divide(self, words: Tensor, classes: dict[triton.Formats, list[int]]) -> None:
        """Lists the work of every launch, and finds places for the sums."""
        tilings: dict[int, Tiling] = {}
        places: list[tuple[int, list[int], int]] = []
        aligned = (triton.aligned(words) & (self.factored.words[:, 2] % triton.ALIGNMENT == 0)).tolist()
        sums = arrivals = 0
        for formats, indices in classes.items():
            for index in indices:
                numel, matrices = int(words[index, 12]), self.factored.matrices(index)
                tiling = tilings[index] = tiling_of(numel, matrices, aligned[index])
                sizes, counters = _room(tiling, matrices, 8 if formats.param == FLOAT64.value else 4)
                starts = [sums + sum(sizes[:k]) for k in range(len(sizes))]
                places.append((index, starts, arrivals))
                sums, arrivals = sums + sum(sizes), arrivals + counters
        if self.sums.numel() < sums or self.arrivals.numel() < arrivals:
            self._make_room("sums", sums)
            self._make_room("arrivals", arrivals)
        for index, starts, counter in places:
            tiling = tilings[index]
            addresses = [self.sums.data_ptr() + _WORD * start for start in starts]
            self.factored.words[index, 7:19] = torch.tensor(
                (tiling.lines, tiling.down, tiling.across, tiling.tiles, tiling.spans, *addresses,
                 self.arrivals.data_ptr() + 4 * counter)
            )  # fmt: skip
        self.tilings = tilings
        super()._divide(words, classes)

    def _launch(self, formats: triton.Formats, words: Tensor, indices: list[int]) -> Launch:
        base = super()._launch(formats, words, indices)
        tiles, factored, spans = [], [], []
        for index in indices:
            tiling = self.tilings[index]
            tiles.append(_work(index, torch.full((tiling.tiles,), tiling.kind)))
            kinds = torch.full((tiling.spans,), kernels.SPAN_MATRIX.value if tiling.matrix else kernels.SPAN_FLAT.value)
            if not tiling.matrix:
                kinds[: tiling.full] = kernels.SPAN_FULL.value
            spans.append(_work(index, kinds))
            if tiling.kind != kernels.FLAT.value:
                factored.append(spans[-1])
        none = torch.zeros((0, 2), dtype=torch.int64)
        lists = [self._on_device(torch.cat([none, *work])) for work in (tiles, factored, spans)]
        return Launch(formats, base.rows, base.starts, *lists)

    def _launch_ahead(self, formats: triton.Formats, one: Tensor) -> Launch:
        return Launch(formats, one, one, one.view(1, 1), one.view(1, 1), one.view(1, 1))

    # ---- the step ----

    def _launch_all(self, control: Control) -> None:
        triton.announce()
        self._upload_scalars(control)
        clips = any(group["d"] is not None for group in self.optimizer.param_groups)
        for launch in self.launches:
            assert isinstance(launch, Launch)
            self._stats(launch, control)
            if clips and len(launch.factored):
                self._norm(launch)
            if len(launch.spans):
                self._apply(launch, control.seed)

    def _stats(self, launch: Launch, control: Control) -> None:
        formats = launch.formats
        bits, pointers = self._pointers(control)
        self._run(
            launch.launchers, ("stats", bits), kernels.stats,
            {
                "CONTROL": bits, "PARAM_FORMAT": formats.param, "GRAD_FORMAT": formats.grad,
                "MASTER_FORMAT": formats.master,
            },
            len(launch.tiles),
            self.rows, self.shapes, launch.tiles, self.groups, self.constants, self.factors, self.steps, self.skip,
            self.scalars, *pointers,
        )  # fmt: skip

    def _norm(self, launch: Launch) -> None:
        self._run(
            launch.launchers, "norm", kernels.norm,
            {"PARAM_FORMAT": launch.formats.param, "GRAD_FORMAT": launch.formats.grad},
            len(launch.factored),
            self.rows, self.shapes, launch.factored, self.groups, self.constants, self.factors, self.steps, self.skip,
        )  # fmt: skip

    def _apply(self, launch: Launch, seed: int) -> None:
        formats = launch.formats
        self._run(
            launch.launchers, "apply", kernels.apply,
            {
                "PARAM_FORMAT": formats.param, "GRAD_FORMAT": formats.grad, "MASTER_FORMAT": formats.master,
                "STATE_FORMATS": formats.states, "STATES": len(formats.states), "STOCHASTIC": formats.stochastic,
            },
            len(launch.spans),
            self.rows, self.shapes, launch.spans, self.constants, self.factors, self.steps, self.skip,
            signed_seed(seed),
        )  # fmt: skip


def _work(index: int, kinds: Tensor) -> Tensor:
    """Tiles or spans 0, 1, ... of one row."""
    return torch.stack((index * 8 + kinds, torch.arange(len(kinds))), 1)


def _room(tiling: Tiling, matrices: Sequence[int] | None, size: int) -> tuple[list[int], int]:
    """Doubles for each kind of sum that a tensor needs, in the order of the kernels' words, and counters."""
    lead, rows, cols = matrices or (0, 0, 0)
    parts = lead * tiling.down

    def words(count: int) -> int:
        return -(-count * size // _WORD)

    sizes = [
        tiling.tiles,
        max(tiling.tiles, tiling.spans),
        words(lead),
        words(lead * rows * tiling.across),
        words(parts * cols),
        parts,
    ]
    return sizes, 1 + (lead * (1 + tiling.down + tiling.across) if tiling.down else 0)
