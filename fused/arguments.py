"""Kinds of arguments: what a configuration file or a typing slip puts in place of a number is named, not compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def check_number(name: str, value: Any) -> None:
    """Raises TypeError unless ``value`` is a number or a tensor. A string is none, whatever it says."""
    kind = type(value)
    if not isinstance(value, Tensor) and not hasattr(kind, "__float__") and not hasattr(kind, "__index__"):
        raise TypeError(f"{name} must be a number, got {value!r} of type {kind.__name__}")


def check_flag(name: str, value: Any) -> None:
    """Raises TypeError unless ``value`` is true or false by itself, as no string is: "no" would count as true."""
    if not hasattr(type(value), "__bool__"):
        raise TypeError(f"{name} must be True or False, got {value!r} of type {type(value).__name__}")


def check_pair(name: str, value: Any) -> None:
    """Raises TypeError unless ``value`` is a sequence, ValueError unless it has two items."""
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise TypeError(f"{name} must be a pair, got {value!r} of type {type(value).__name__}")
    if len(value) != 2:
        raise ValueError(f"{name} must be a pair, got {value!r}")
