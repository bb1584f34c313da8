"""What the tests in Triton's interpreter share: making it quick enough, and a record of what is launched."""

from __future__ import annotations

from typing import NamedTuple

from triton.runtime import interpreter

from fused.backends.triton import kernels


def hasten():
    """Has the language's functions exchanged for interpreted ones once per launch and module.

    Triton's interpreter does so at every call of a function, which takes longer than all that the function computes.
    """
    patch = interpreter._patch_lang
    patch_tensor = interpreter._patch_lang_tensor
    launch = interpreter.GridExecutor.__call__
    patched = set()

    def patch_once(fn):
        module = id(fn.__globals__)
        if module in patched:
            return None  # asked for by a function within a kernel, which does not look at it
        patched.add(module)
        return patch(fn)

    def launch_anew(self, *args, **kwargs):
        patched.clear()  # undone after every launch
        return launch(self, *args, **kwargs)

    def patch_tensor_and_index(tensor, *scope):
        patch_tensor(tensor, *scope)
        # Triton up to 3.6 leaves the conversion to NumPy, whose releases from 2.4 on refuse an array of one element.
        tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interpreter._patch_lang = patch_once
    interpreter._patch_lang_tensor = patch_tensor_and_index
    interpreter.GridExecutor.__call__ = launch_anew


class Launch(NamedTuple):
    """A kernel that was launched, or compiled ahead, with its constants."""

    kernel: str
    ahead: bool
    constants: tuple[tuple[str, str], ...]


def record_launches(monkeypatch):
    """A list that everything launched from now on is added to."""
    launched = []
    run = type(kernels.update).run

    def record(self, *args, grid, warmup, **constants):
        named = tuple(sorted((name, str(value)) for name, value in constants.items()))
        launched.append(Launch(self.fn.__name__, warmup, named))
        return run(self, *args, grid=grid, warmup=warmup, **constants)

    monkeypatch.setattr(type(kernels.update), "run", record)
    return launched


def check_compiled_ahead(launched):
    """What a warm-up compiled and what was launched later is the same."""
    compiled = {(launch.kernel, launch.constants) for launch in launched if launch.ahead}
    assert compiled == {(launch.kernel, launch.constants) for launch in launched if not launch.ahead}
