"""Company: processes that keep CPUs busy beside a measurement, as the workers of a data loader do in training.

A step that opens one parallel region per tensor waits in each of them for a thread that has lost its core; one that
opens a single region waits once. What this costs shows only when the cores are shared.
"""

from __future__ import annotations

import os
import subprocess
import sys

# Unpacks two megabytes of text again and again, which is what decoding samples is like; ends with its parent.
_WORK = """
import os, sys, zlib
parent = int(sys.argv[1])
packed = zlib.compress(b" ".join(b"%d" % (i * i) for i in range(200_000)))
print("busy", flush=True)
while os.getppid() == parent:
    zlib.decompress(packed)
"""


class Busy:
    """`with Busy(2): ...` runs two busy processes meanwhile; all of them work before the block begins."""

    def __init__(self, count: int) -> None:
        if count < 0:
            raise ValueError(f"--beside {count}: the number of busy processes cannot be negative")
        self.count = count
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Busy:
        command = [sys.executable, "-S", "-c", _WORK, str(os.getpid())]
        try:
            for _ in range(self.count):
                self._processes.append(subprocess.Popen(command, stdout=subprocess.PIPE))
            for process in self._processes:
                if process.stdout is None or process.stdout.readline().strip() != b"busy":
                    raise RuntimeError(f"a busy process did not start (exit code {process.wait()})")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        self._processes.clear()


def company(count: int) -> str:
    """What a heading says of it; nothing where there was none."""
    return f"beside {count} busy process{'es' if count != 1 else ''}" if count else ""
