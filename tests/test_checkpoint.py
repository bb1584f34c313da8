"""Float32 weights in and out, masters of one kind into another, bytes by kind."""

from __future__ import annotations

import copy
import io
from itertools import product

import pytest
import torch

import fused
from fused import formats

KINDS = ("fp32", "split", "split8")


def trained(kind: str | None, steps: int = 3, **options: object) -> tuple[torch.nn.Module, fused.AdamW]:
    torch.manual_seed(0)
    model = torch.nn.Linear(33, 17).bfloat16()
    optimizer = fused.AdamW(model.parameters(), lr=1e-3, master_weights=kind, **options)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model: torch.nn.Module, optimizer: fused.AdamW, scale: float = 1.0) -> None:
    for param in model.parameters():
        param.grad = torch.randn_like(param) * scale
    optimizer.step()


@pytest.mark.parametrize("saved, live", list(product(KINDS, KINDS)))
@pytest.mark.parametrize("model_first", [True, False])
def test_masters_convert_on_load(saved: str, live: str, model_first: bool) -> None:
    model, optimizer = trained(saved)
    weights = {name: w.clone() for name, w in fused.master_state_dict(model, optimizer).items()}
    other = torch.nn.Linear(33, 17).bfloat16()
    taker = fused.AdamW(other.parameters(), lr=1e-3, master_weights=live)
    loads = [lambda: other.load_state_dict(model.state_dict()), lambda: taker.load_state_dict(optimizer.state_dict())]
    for load in loads if model_first else reversed(loads):
        load()
    for group in taker.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    step(other, taker, 0.0)
    for name, w in fused.master_state_dict(other, taker).items():
        bound = 2.0**-16 if live == "split8" and saved != "split8" else 0.0
        torch.testing.assert_close(w, weights[name], rtol=bound, atol=0)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_master_weights_round_trip(kind: str | None) -> None:
    model, optimizer = trained(kind)
    weights = {name: w.clone() for name, w in fused.master_state_dict(model, optimizer).items()}
    assert all(w.dtype == torch.float32 for w in weights.values())
    step(model, optimizer)
    fused.load_master_state_dict(model, optimizer, weights)
    for name, w in fused.master_state_dict(model, optimizer).items():
        assert torch.equal(w, weights[name])


def test_master_weights_before_the_first_step() -> None:
    model = torch.nn.Linear(5, 3).bfloat16()
    optimizer = fused.AdamW(model.parameters(), master_weights="split")
    given = {name: torch.randn_like(p, dtype=torch.float32) for name, p in model.named_parameters()}
    fused.load_master_state_dict(model, optimizer, given)
    for name, w in fused.master_state_dict(model, optimizer).items():
        assert torch.equal(w, given[name])


def test_loading_master_weights_raises_before_changing_anything() -> None:
    model, optimizer = trained("split")
    before = [p.clone() for p in model.parameters()]
    weights = dict(fused.master_state_dict(model, optimizer))
    with pytest.raises(ValueError, match="'bias' of shape"):
        changed = {"weight": weights["weight"] + 1, "bias": torch.zeros(2)}
        fused.load_master_state_dict(model, optimizer, changed)
    with pytest.raises(KeyError, match="extra"):
        fused.load_master_state_dict(model, optimizer, {**weights, "extra": torch.zeros(1)})
    with pytest.raises(TypeError, match="SGD"):
        fused.master_state_dict(model, torch.optim.SGD(model.parameters(), lr=0.1))  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16, "int8"])
@pytest.mark.parametrize("kind", [None, *KINDS])
def test_state_dict_round_trip_and_resume(kind: str | None, state_dtype: object) -> None:
    """Bit for bit through a file, and the resumed run goes on as the first one, stochastic rounding included."""
    options = {"state_dtype": state_dtype, "stochastic_rounding": True, "seed": 11}
    model, optimizer = trained(kind, **options)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    other, taker = trained(kind, steps=0, **options)
    other.load_state_dict(saved["model"])
    taker.load_state_dict(saved["optimizer"])
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert optimizer.state[p].keys() == taker.state[q].keys()
        for name, value in optimizer.state[p].items():
            assert value.dtype == taker.state[q][name].dtype and torch.equal(value, taker.state[q][name]), name
    for m, o in ((model, optimizer), (other, taker)):
        torch.manual_seed(5)
        step(m, o)
        step(m, o)
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert all(torch.equal(value, taker.state[q][name]) for name, value in optimizer.state[p].items())


@pytest.mark.parametrize(
    "shape, form",
    [(shape, torch.contiguous_format) for shape in ((), (0,), (3, 0, 2), (2,), (5, 2))]
    + [((2, 3, 4, 5), torch.channels_last)],
    ids=str,
)
def test_words_are_saved_as_bytes(shape: tuple[int, ...], form: torch.memory_format) -> None:
    """16-bit integers, which collectives do not carry, are bytes in a checkpoint; one of integers loads too."""
    params = [torch.nn.Parameter(torch.randn(shape).bfloat16().to(memory_format=form)) for _ in range(3)]
    first, *others = (fused.AdamW([p], lr=0.1, master_weights="split", state_dtype="int8") for p in params)
    params[0].grad = torch.randn_like(params[0])
    first.step()
    state = first.state[params[0]]
    saved = first.state_dict()
    assert torch.int16 not in {value.dtype for value in saved["state"][0].values()}
    assert saved["state"][0]["remainder"].shape == (*shape, 2)
    assert saved["state"][0]["remainder"].data_ptr() == state["remainder"].data_ptr()
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    words = {**saved, "state": {0: dict(state)}}
    for p, other, given in zip(params[1:], others, (torch.load(file, weights_only=True), words), strict=True):
        other.load_state_dict(given)
        assert other.state[p].keys() == state.keys()
        for name, value in state.items():
            loaded = other.state[p][name]
            assert loaded.dtype is value.dtype and torch.equal(loaded, value), name
            assert loaded.data_ptr() != value.data_ptr() or not value.numel()
        with torch.no_grad():
            p.copy_(params[0])
        p.grad = params[0].grad
        other.step()
    first.step()
    for p in params[1:]:
        assert torch.equal(p, params[0])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_saved_state_put_in_place(backend: str) -> None:
    """ZeroRedundancyOptimizer writes what a state dictionary holds into ``optimizer.state`` itself."""
    params = [torch.nn.Parameter(torch.randn(70).bfloat16()) for _ in range(2)]
    options = {"lr": 0.1, "master_weights": "split", "state_dtype": "int8", "backend": backend}
    first, second = (fused.AdamW([("weight", p)], **options) for p in params)
    params[0].grad = torch.randn_like(params[0])
    first.step()
    with torch.no_grad():
        params[1].copy_(params[0])
    params[1].grad = params[0].grad
    second.state[params[1]] = copy.deepcopy(first.state_dict()["state"][0])
    model = torch.nn.ParameterDict({"weight": params[1]})
    expected = fused.master_state_dict(torch.nn.ParameterDict({"weight": params[0]}), first)["weight"]
    if backend == "cpu":  # exporting converts it too
        assert torch.equal(fused.master_state_dict(model, second)["weight"], expected)
    for optimizer in (first, second):
        optimizer.step()
    assert torch.equal(params[0], params[1])
    for name, value in first.state[params[0]].items():
        assert value.dtype is second.state[params[1]][name].dtype and torch.equal(value, second.state[params[1]][name])


def test_a_state_dict_of_torch_converts() -> None:
    model = torch.nn.Linear(64, 32)
    theirs = torch.optim.AdamW(model.parameters())
    for param in model.parameters():
        param.grad = torch.randn_like(param)
    theirs.step()
    ours = fused.AdamW(model.parameters(), state_dtype="int8")
    ours.load_state_dict(theirs.state_dict())
    state = ours.state[model.weight]
    assert state["exp_avg"].dtype == torch.uint8
    decoded = formats.decode_blocks8(state["exp_avg_sq"], state["exp_avg_sq_scale"], signed=False)
    torch.testing.assert_close(decoded, theirs.state[model.weight]["exp_avg_sq"], rtol=0.2, atol=0)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("master", torch.zeros(3), "'master' of .* has shape"),
        ("remainder", torch.zeros(2, 4, dtype=torch.int16), "'remainder' of .* has shape"),
        ("exp_avg", torch.zeros(9, dtype=torch.uint8), "'exp_avg' of .* has shape"),
        ("exp_avg_scale", torch.zeros(1, dtype=torch.int16), "'exp_avg' of .* needs 3 numbers in 'exp_avg_scale'"),
        ("exp_avg_scale", torch.zeros(3, dtype=torch.uint8), "'exp_avg' of .* needs 3 numbers in 'exp_avg_scale'"),
        ("step", torch.zeros(2), "'step' of .* has shape"),
    ],
)
def test_damaged_state_is_refused(name: str, value: torch.Tensor, message: str) -> None:
    """Kernels would read, and write, beyond what is there."""
    p = torch.nn.Parameter(torch.ones(70, dtype=torch.bfloat16))
    optimizer = fused.AdamW([p], master_weights="fp32" if name == "master" else "split", state_dtype="int8")
    p.grad = torch.ones_like(p)
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    damaged = copy.deepcopy(before)
    damaged["state"][0][name] = value
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(damaged)
    for key, kept in before["state"][0].items():
        assert torch.equal(optimizer.state_dict()["state"][0][key], kept)
    if name != "step":
        optimizer.state[p][name] = value
        held = p.detach().clone()
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
        assert torch.equal(p, held)


def test_state_on_another_device_is_refused() -> None:
    p = torch.nn.Parameter(torch.ones(70))
    optimizer = fused.AdamW([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.state[p]["exp_avg_sq"] = optimizer.state[p]["exp_avg_sq"].to("meta")
    with pytest.raises(RuntimeError, match=r"'exp_avg_sq' of .* is on meta, its parameter on cpu"):
        optimizer.step()


@pytest.mark.parametrize("step", [3, 3.0, torch.tensor(3), torch.tensor([3.0]), torch.tensor(3.0).double()], ids=repr)
def test_any_form_of_a_step_count(step: object) -> None:
    p, q = (torch.nn.Parameter(torch.ones(5)) for _ in range(2))
    loaded, replaced = fused.AdamW([p]), fused.AdamW([q])
    for x, optimizer in ((p, loaded), (q, replaced)):
        x.grad = torch.ones_like(x)
        optimizer.step()
    saved = loaded.state_dict()
    saved["state"][0] = {**saved["state"][0], "step": step}
    loaded.load_state_dict(saved)
    replaced.state[q]["step"] = copy.deepcopy(step)
    for optimizer in (loaded, replaced):
        optimizer.step()
    assert loaded.state[p]["step"] == replaced.state[q]["step"] == 4
    assert torch.equal(p, q) and torch.as_tensor(step).reshape(()) == 3


def test_state_with_gaps_is_loaded_into_8_bits() -> None:
    p = torch.nn.Parameter(torch.ones(70))
    source = fused.AdamW([p])
    p.grad = torch.linspace(-1, 1, 70)
    source.step()
    saved = copy.deepcopy(source.state_dict())
    for name in ("exp_avg", "exp_avg_sq"):
        saved["state"][0][name] = torch.stack((saved["state"][0][name], torch.full((70,), 7.0)), 1)[:, 0]
    dense, gaps = (fused.AdamW([p], state_dtype="int8") for _ in range(2))
    dense.load_state_dict(source.state_dict())
    gaps.load_state_dict(saved)
    for name, value in dense.state[p].items():
        assert torch.equal(gaps.state[p][name], value), name


BYTES = [
    (fused.AdamW, "split", torch.float32, {}, 12.0),
    (fused.AdamW, "split", torch.bfloat16, {}, 8.0),
    (fused.AdamW, "split8", "int8", {}, 5.15),
    (fused.Lion, "split8", "int8", {}, 4.1),
    (fused.SGD, "split8", "int8", {"lr": 0.1, "momentum": 0.9}, 4.1),
]


@pytest.mark.parametrize("make, kind, state_dtype, more, most", BYTES)
def test_bytes_per_parameter(make, kind, state_dtype, more, most) -> None:  # type: ignore[no-untyped-def]
    p = torch.nn.Parameter(torch.zeros(1_000_000, dtype=torch.bfloat16))
    optimizer = make([p], master_weights=kind, state_dtype=state_dtype, **more)
    p.grad = torch.ones_like(p)
    optimizer.step()
    memory = optimizer.memory()
    assert memory.per_parameter <= most + 1e-5
    assert memory.elements == p.numel()
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in (p, *optimizer.state[p].values())}
    assert memory.total == sum(held.values())
    assert str(memory).splitlines()[-1].split() == ["total", f"{memory.total:,}", f"{memory.per_parameter:.4f}"]


@pytest.mark.parametrize(
    "options", [{"master_weights": "split"}, {"master_weights": "split8"}, {"stochastic_rounding": True}]
)
def test_weight_decay_is_not_lost_in_bfloat16(options: dict[str, object]) -> None:
    start = torch.linspace(0.75, 1.5, 4096).bfloat16()
    ends = {}
    for name, kwargs in (("ours", options), ("plain", {})):
        p = torch.nn.Parameter(start.clone())
        optimizer = fused.AdamW([p], lr=1e-3, weight_decay=0.1, **kwargs)  # type: ignore[arg-type]
        p.grad = torch.zeros_like(p)
        for _ in range(1000):
            optimizer.step()
        ends[name] = p.detach().double().mean()
    expected = start.double().mean() * (1 - 1e-4) ** 1000
    assert abs(ends["ours"] / expected - 1) < 0.01
    assert ends["plain"] == start.double().mean()  # rounds back to where it was, every time
