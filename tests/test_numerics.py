"""Every backend against the float64 references, the instruction sets against each other, and torch.optim beside it."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, IDS, VARIANTS, Case, Variant
from conftest import Backend
from oracle import SIZES, Oracle, make_params, set_gradients

from fused import backends
from fused.backends import reference
from fused.rules import RULES

SHAPES = [(size,) for size in SIZES] + [()]
SMALL_SHAPES = [(size,) for size in SIZES[:-1]] + [(2049,), ()]
GRADIENTS = {
    torch.float32: (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    torch.float64: (torch.float64, torch.float32, torch.bfloat16),
    torch.bfloat16: (torch.bfloat16, torch.float32, torch.float16),
    torch.float16: (torch.float16, torch.float32, torch.bfloat16),
    torch.complex64: (torch.complex64, torch.complex128),
}
DTYPE_IDS = [str(dtype).removeprefix("torch.") for dtype in GRADIENTS]


def test_every_rule_has_a_case() -> None:
    assert {variant.rule for _, variant in VARIANTS} == set(RULES)


def test_every_variant_leads_to_its_rule() -> None:
    for case, variant in VARIANTS:
        optimizer = case.make([torch.nn.Parameter(torch.ones(1))], variant)
        assert optimizer._rule(optimizer.param_groups[0]) is RULES[variant.rule]


def test_every_rule_is_in_every_backend() -> None:
    assert list(reference.FUNCTIONS) == list(RULES)
    if backends.extension is not None:
        compiled = backends.extension.rule_info()
        assert compiled == [(rule.name, len(rule.states), len(rule.hypers)) for rule in RULES.values()]


def test_every_public_optimizer_has_a_case() -> None:
    import fused

    public = {getattr(fused, name) for name in fused.__all__}
    elementwise = {
        item
        for item in public
        if isinstance(item, type) and issubclass(item, fused.FusedOptimizer) and item is not fused.FusedOptimizer
    }
    assert {case.optimizer for case in CASES} <= elementwise


@pytest.mark.parametrize("dtype", GRADIENTS, ids=DTYPE_IDS)
@pytest.mark.parametrize("case, variant", VARIANTS, ids=IDS)
def test_one_list_of_all_sizes(case: Case, variant: Variant, dtype: torch.dtype, backend: Backend) -> None:
    # The large size with one variant per rule where the parameter is not float32: it takes most of the time.
    large = dtype == torch.float32 or variant is next(first for _, first in VARIANTS if first.rule == variant.rule)
    params = make_params(SHAPES if large else SMALL_SHAPES, dtype, backend.device)
    oracle = Oracle(case, variant, case.make(params, variant, backend=backend.name), params)
    for step in range(3):
        set_gradients(params, GRADIENTS[dtype][step:] + GRADIENTS[dtype][:step])
        oracle.step()
