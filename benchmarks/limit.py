"""Time limits that hold: whatever runs is broken off when its time is up, in the middle of a competitor's compilation
if need be.

Deadlines (`--limit`) are kept by the commands between cells; this is for what takes longer than anybody planned.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class TimeUpError(BaseException):
    """The time is up. No Exception, so that nothing which tries things out takes it for one of its own."""


def _raise(*_: Any) -> None:
    raise TimeUpError


def disarm() -> None:
    """Nothing is broken off any more: for those who have been, and write down what they have."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_REAL, 0.0)


@contextmanager
def broken_off_after(seconds: float) -> Iterator[None]:
    """TimeUpError in the block after `seconds`; without effect on systems and in threads that know no such alarm."""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, _raise)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.01))
    try:
        yield
    finally:
        disarm()
        signal.signal(signal.SIGALRM, before)
