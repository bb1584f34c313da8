"""Examples in docstrings and in the README run as they stand, with a small model in the place of the reader's."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import fused

README = Path(__file__).parent.parent / "README.md"


def examples() -> list[Any]:
    """Every docstring of the package that has an example, but those of kernels and of the command line."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    found = {}
    for module in pkgutil.walk_packages(fused.__path__, "fused."):
        if "triton" in module.name or module.name.startswith(("fused.demo", "fused.__main__", "fused._C")):
            continue
        for test in finder.find(importlib.import_module(module.name), extraglobs={}):
            if test.examples:
                found[test.name] = test
    return [pytest.param(test, id=name) for name, test in sorted(found.items())]


def surroundings(example: str) -> dict[str, Any]:
    """What examples take for granted: a model after its backward pass, its data, an optimizer and a scaler.

    A batch passes through the model to one number, which ``loss`` is too.
    """
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    if "master_weights" in example:
        net.bfloat16()
    batch = torch.randn(3, 4, dtype=next(net.parameters()).dtype)

    class Mean(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = net

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """One number."""
            mean: torch.Tensor = self.layers(x).mean()
            return mean

    model = Mean()
    if "load_master" in example:
        torch.save(model.state_dict(), "weights.pt")
    kind = torch.optim.AdamW if "from_torch" in example else fused.AdamW
    optimizer = kind(model.parameters())
    loss = model(batch)
    loss.backward(retain_graph=True)
    return {
        "torch": torch,
        "fused": fused,
        "model": model,
        "batch": batch,
        "micro_batches": [batch, batch],
        "loss": loss,
        "optimizer": optimizer,
        "scaler": fused.GradScaler("cpu"),
    }


@pytest.mark.parametrize("test", examples())
def test_docstrings(test: doctest.DocTest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = surroundings("".join(example.source for example in test.examples))
    for example in test.examples:
        exec(compile(example.source, test.name, "exec"), names)  # noqa: S102


def test_every_public_name_has_an_example() -> None:
    shown = " ".join(example.source for param in examples() for example in param.values[0].examples)
    for name in fused.__all__:
        item = getattr(fused, name)
        if callable(item) and (inspect.isfunction(item) or item is not fused.FusedOptimizer) and name != "Memory":
            assert name in shown, f"fused.{name} has no example"


@pytest.mark.skipif(not README.is_file(), reason="needs the source tree")
def test_readme() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        names: dict[str, Any] = {}
        exec(compile(block, "README.md", "exec"), names)  # noqa: S102
        assert torch.isfinite(names["loss"])
