"""Parameter lists of real models (shapes only), and the little notation for any other list.

gpt2, llama3-8b, ...     a profile by name
llama3-8b/8              the 1/8 shard of every tensor (split along its first dimension, as FSDP does)
1000x32K                 1000 vectors of 32,768 elements
1000x64x64               1000 matrices of 64 x 64
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

Shape = tuple[int, ...]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclass(frozen=True)
class Profile:
    """A named list of parameter shapes."""

    name: str
    shapes: tuple[Shape, ...]

    @property
    def tensors(self) -> int:
        return len(self.shapes)

    @property
    def elements(self) -> int:
        return sum(math.prod(s) for s in self.shapes)


def _gpt2(layers: int, width: int) -> list[Shape]:
    d = width
    block: list[Shape] = [
        (d,),
        (d,),
        (d, 3 * d),
        (3 * d,),
        (d, d),
        (d,),
        (d,),
        (d,),
        (d, 4 * d),
        (4 * d,),
        (4 * d, d),
        (d,),
    ]
    return [(50257, d), (1024, d), *block * layers, (d,), (d,)]


def _llama3_8b() -> list[Shape]:
    d, kv, ffn = 4096, 1024, 14336
    block: list[Shape] = [(d, d), (kv, d), (kv, d), (d, d), (ffn, d), (ffn, d), (d, ffn), (d,), (d,)]
    return [(128256, d), *block * 32, (d,), (128256, d)]


def _lora() -> list[Shape]:
    """Rank-16 adapters on every linear layer of Llama-3-8B."""
    d, kv, ffn, rank = 4096, 1024, 14336, 16
    linears = [(d, d), (kv, d), (kv, d), (d, d), (ffn, d), (ffn, d), (d, ffn)]
    block = [s for out, into in linears for s in ((rank, into), (out, rank))]
    return [*block * 32]


def _vit_l() -> list[Shape]:
    d = 1024
    block: list[Shape] = [
        (d,),
        (d,),
        (3 * d, d),
        (3 * d,),
        (d, d),
        (d,),
        (d,),
        (d,),
        (4 * d, d),
        (4 * d,),
        (d, 4 * d),
        (d,),
    ]
    return [(1, 1, d), (1, 197, d), (d, 3, 16, 16), (d,), *block * 24, (d,), (d,), (1000, d), (1000,)]


def _resnet50() -> list[Shape]:
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    into = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for index in range(blocks):
            convs = [(width, into, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if index == 0:
                convs.append((4 * width, into, 1, 1))
            for conv in convs:
                shapes += [conv, (conv[0],), (conv[0],)]
            into = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


PROFILES: dict[str, tuple[str, Callable[[], list[Shape]]]] = {
    "gpt2": ("GPT-2 small", lambda: _gpt2(12, 768)),
    "gpt2-xl": ("GPT-2 XL", lambda: _gpt2(48, 1600)),
    "llama3-8b": ("Llama-3-8B", _llama3_8b),
    "resnet50": ("ResNet-50", _resnet50),
    "vit-l": ("ViT-L/16", _vit_l),
    "lora": ("LoRA adapters, rank 16, of Llama-3-8B", _lora),
    "tiny": ("10,000 tensors of 256 elements", lambda: [(256,)] * 10_000),
    "huge": ("one tensor of 2^30 elements", lambda: [(1 << 30,)]),
}


def _number(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)", text.strip().upper())
    if not match:
        raise ValueError(f"not a number: {text!r} (examples: 256, 32K, 1.5M)")
    return int(float(match[1]) * _UNITS[match[2]])


def parse_count(text: str) -> int:
    """'32M' -> 33,554,432."""
    return _number(text)


def format_count(n: int) -> str:
    """33,554,432 -> '32M'; only exact multiples are shortened."""
    for unit in ("G", "M", "K"):
        if n and n % _UNITS[unit] == 0:
            return f"{n // _UNITS[unit]}{unit}"
    return str(n)


def _shard(shape: Shape, parts: int) -> Shape:
    """The first of `parts` equal shards along the first dimension that is not 1."""
    for axis, size in enumerate(shape):
        if size > 1:
            return (*shape[:axis], -(-size // parts), *shape[axis + 1 :])
    return shape


def get_profile(text: str) -> Profile:
    """A profile from its name, name/parts, or COUNTxDIMxDIM..."""
    name, _, parts = text.strip().lower().partition("/")
    if name in PROFILES:
        shapes = PROFILES[name][1]()
        if parts:
            shapes = [_shard(s, int(parts)) for s in shapes]
        return Profile(text.strip().lower(), tuple(shapes))
    count, *dims = re.split("[x*]", text.strip())
    if not dims:
        raise ValueError(
            f"no profile {text!r}: one of {', '.join(PROFILES)}, or like 1000x32K, 1000x64x64, llama3-8b/8"
        )
    return Profile(text.strip(), (tuple(_number(d) for d in dims),) * _number(count))


def shrink(profile: Profile, n: int) -> Profile:
    """The profile with every tensor sharded so that it holds about `n` elements (at most what it had)."""
    parts = max(1, round(profile.elements / n))
    if parts == 1:
        return profile
    if profile.tensors == 1 and len(profile.shapes[0]) == 1:
        return Profile(f"1x{format_count(n)}", ((n,),))
    return Profile(f"{profile.name}/{parts}", tuple(_shard(s, parts) for s in profile.shapes))
