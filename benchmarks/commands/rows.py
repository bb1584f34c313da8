"""The table of measured steps that several subcommands print."""

from __future__ import annotations

from collections.abc import Sequence

from ..report import Row, number, percent, show_table, times

STEP_COLUMNS = (
    "profile",
    "system",
    "median ms",
    "p20-p80",
    "host ms",
    "B/elem",
    "GB/s",
    "of copy",
    "ours is",
    "status",
)


def step_cells(row: Row) -> list[str]:
    if not row.ok:
        return [row.profile, row.label, "-", "-", "-", "-", "-", "-", "-", row.status]
    return [
        row.profile,
        row.label,
        number(row.median_ms),
        f"{number(row.p20_ms)}-{number(row.p80_ms)}",
        number(row.host_ms),
        number(row.model_bytes),
        number(row.gbs),
        percent(row.copy_fraction),
        "" if row.system == "fused" else times(row.ratio),
        row.note or "ok",
    ]


def show_rows(title_: str, rows: Sequence[Row], caption: str = "") -> None:
    show_table(title_, STEP_COLUMNS, [step_cells(r) for r in rows], caption)
