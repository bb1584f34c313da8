"""Every backend against the float64 references, the instruction sets against each other, and torch.optim beside it."""

from __future__ import annotations

import pytest
import torch
from cases import CASES, COUNTERPART_IDS, IDS, VARIANTS, WITH_COUNTERPART, Case, Variant, rule_of
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


def trajectory(case: Case, variant: Variant, dtype: torch.dtype) -> list[torch.Tensor]:
    """Parameters and states after some steps of the compiled kernels, large enough for several threads."""
    torch.manual_seed(3)
    params = make_params([(65537,), (63,), (33000,), ()], dtype, torch.device("cpu"))
    optimizer = case.make(params, variant, backend="cpu")
    for _ in range(2):
        set_gradients(params, GRADIENTS[dtype])
        optimizer.step()
    states = [optimizer.state[p][name] for p in params for name in rule_of(variant).states]
    return [*(p.detach() for p in params), *states]


def first_variants() -> list[tuple[Case, Variant]]:
    """One variant of every rule."""
    return list({variant.rule: (case, variant) for case, variant in VARIANTS[::-1]}.values())[::-1]


@pytest.mark.parametrize("dtype", GRADIENTS, ids=DTYPE_IDS)
@pytest.mark.parametrize("case, variant", first_variants(), ids=lambda value: getattr(value, "rule", None))
def test_instruction_sets_agree_bit_for_bit(case: Case, variant: Variant, dtype: torch.dtype, isas: list[str]) -> None:
    results = {}
    for isa in isas:
        backends.extension.select_isa(isa)
        assert backends.extension.isa() == isa
        results[isa] = trajectory(case, variant, dtype)
    for isa, result in results.items():
        for a, b in zip(result, results["baseline"], strict=True):
            assert bool(((a == b) | (a.isnan() & b.isnan())).all()), isa


@pytest.mark.parametrize("case, variant", first_variants(), ids=lambda value: getattr(value, "rule", None))
def test_threads_agree_bit_for_bit(case: Case, variant: Variant, threads: None) -> None:
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(trajectory(case, variant, torch.float32))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


# ---- torch.optim beside it, from the same values at every step ----


def beside_torch(case: Case, variant: Variant, shapes: list[tuple[int, ...]], **mode: bool):  # type: ignore[no-untyped-def]
    """Yields (old, new, torch's new, state, torch's state) of every parameter for some steps."""
    ours = make_params(shapes, torch.float32, torch.device("cpu"))
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    mine, other = case.make(ours, variant, backend="cpu"), case.make_counterpart(theirs, variant, **mode)
    for _ in range(3):
        set_gradients(ours)
        old = [p.detach().clone() for p in ours]
        momenta = [mine.state.get(p, {}).get("momentum_buffer") for p in ours]
        momenta = [torch.zeros_like(o) if m is None else m.clone() for m, o in zip(momenta, old, strict=True)]
        for p, q in zip(ours, theirs, strict=True):
            q.data.copy_(p.data)
            q.grad = p.grad.clone()
            for name, value in mine.state.get(p, {}).items():
                if isinstance(other.state[q].get(name), torch.Tensor) and name != "step":
                    other.state[q][name].copy_(value)
        mine.step()
        other.step()
        lr = float(mine.param_groups[0]["lr"])
        for p, q, o, m in zip(ours, theirs, old, momenta, strict=True):
            yield o, lr * m.abs(), p.detach(), q.detach(), mine.state[p], other.state[q]


@pytest.mark.skipif(backends.extension is None, reason="the compiled extension is not there")
@pytest.mark.parametrize("case, variant", WITH_COUNTERPART, ids=COUNTERPART_IDS)
def test_parameters_are_those_of_torchs_fused(case: Case, variant: Variant) -> None:
    """Bit for bit, where torch.optim has a fused form for the CPU."""
    if "fused" not in case.optimizer.__init__.__annotations__:
        pytest.skip("torch.optim has no fused form of it")
    for _, _, p, q, _, _ in beside_torch(case, variant, [(4097,), (7,), ()], fused=True):
        assert torch.equal(p, q)


# What torch computes bit for bit as we do; the others go through its square root, which for more than some 64 elements
# is a vectorized one and not rounded correctly.
ROOT_FREE = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "grad_avg", "sum"}


@pytest.mark.skipif(backends.extension is None, reason="the compiled extension is not there")
@pytest.mark.parametrize("case, variant", WITH_COUNTERPART, ids=COUNTERPART_IDS)
def test_torchs_for_loop_beside_it(case: Case, variant: Variant) -> None:
    """States bit for bit; parameters within a few ulp of the largest of the old value, the change and the old momentum.

    The ulp are torch's own: its vectorized square root is off by one, and up to three roundings follow. Where the rate
    is a tensor it derives constants in float32 as well.
    """
    ulps = 16.0 if variant.name == "tensors" else 5.0 if case.name in ("RMSprop", "Adagrad", "Adadelta") else 4.0
    for old, momentum, p, q, mine, other in beside_torch(case, variant, [(4097,), (7,), ()], foreach=False):
        # A gradient may cancel most of the momentum: what is rounded is as large as before.
        scale = torch.maximum(torch.maximum(old.abs(), (p - old).abs()), momentum).double()
        ulp = torch.exp2(torch.floor(torch.log2(scale)) - 23)
        assert bool(((p.double() - q.double()).abs() <= ulps * ulp).all())
        for name in rule_of(variant).states:
            exact = name in ROOT_FREE or case.name == "SGD"
            assert not exact or torch.equal(mine[name], other[name]), name
