"""torch.distributed.checkpoint, FSDP2, ZeroRedundancyOptimizer: two processes go on from what they saved."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES
from two_processes import WORLD, dist, in_two_processes

import fused
from fused.state import local

FORMATS: list[tuple[type[fused.FusedOptimizer], dict[str, Any]]] = [
    (fused.AdamW, {}),
    (fused.AdamW, {"max_grad_norm": 0.1, "state_dtype": torch.bfloat16, "stochastic_rounding": True}),
    (fused.AdamW, {"state_dtype": "int8"}),
    (fused.AdamW, {"master_weights": "split"}),
    (fused.Lion, {"master_weights": "split8", "state_dtype": "int8"}),
    (fused.Adagrad, {"lr": 0.1, "master_weights": "fp32"}),
    (fused.SGD, {"lr": 0.1}),
]


def _model(options: dict[str, Any], mesh: Any) -> torch.nn.Module:
    """Shards of unequal sizes, an empty one, and blocks of 8-bit codes that end within them."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(26, 5), torch.nn.Tanh(), torch.nn.Linear(5, 1))
    if "master_weights" in options:
        net.bfloat16()
    if mesh is not None:
        fully_shard(net, mesh=mesh)
    return net


def _step(net: torch.nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    torch.manual_seed(seed)
    optimizer.zero_grad()
    net(torch.randn(4, 26).to(next(net.parameters()).dtype)).float().square().sum().backward()
    optimizer.step()


def _resumed(cls: type, options: dict[str, Any], mesh: Any, how: str, folder: str) -> bool:
    """Whether a run that was saved and loaded half way ends as the one that was not."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as states

    first, second = (_model(options, mesh) for _ in range(2))
    a, b = cls(first.parameters(), **options), cls(second.parameters(), **options)
    for seed in range(2):
        _step(first, a, seed)
    whole = how == "full"
    asked = states.StateDictOptions(full_state_dict=whole, flatten_optimizer_state_dict=how == "flat")
    saved = copy.deepcopy(states.get_state_dict(first, a, options=asked))
    with torch.no_grad():
        for p in second.parameters():
            p.mul_(0.5)
    if not whole:
        dcp.save(dict(zip(("model", "optimizer"), saved, strict=True)), checkpoint_id=folder)
        before = [local(p.detach()).clone() for p in second.parameters()]
        loaded = dict(zip(("model", "optimizer"), states.get_state_dict(second, b, options=asked), strict=True))
        same = [torch.equal(local(p), old) for p, old in zip(second.parameters(), before, strict=True)]
        assert all(same)  # state is made by a step that must move nothing
        dcp.load(loaded, checkpoint_id=folder)
        saved = loaded["model"], loaded["optimizer"]
    given = states.StateDictOptions(
        full_state_dict=whole, flatten_optimizer_state_dict=how == "flat", broadcast_from_rank0=whole
    )
    states.set_state_dict(second, b, model_state_dict=saved[0], optim_state_dict=saved[1], options=given)
    for seed in range(2, 4):
        _step(first, a, seed)
        _step(second, b, seed)
    return all(torch.equal(local(p), local(q)) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def _whole_state_is_refused(mesh: Any) -> bool:
    """A state dictionary of the unsharded model, loaded without dividing it."""
    net, sharded = _model({}, None), _model({}, mesh)
    whole, divided = (fused.AdamW(n.named_parameters()) for n in (net, sharded))
    _step(net, whole, 0)
    try:
        divided.load_state_dict(whole.state_dict())
    except ValueError as error:
        return "'exp_avg'" in str(error) and "state_dict divides" in str(error) and not divided.state
    return False


def _zero_redundancy(rank: int) -> list[str]:
    """ZeroRedundancyOptimizer's steps, and its state gathered, loaded into both it and one optimizer of everything."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    wrong = []
    for cls, options in (
        *((case.optimizer, {**case.defaults, **case.variants[0].kwargs}) for case in CASES),
        (fused.Adafactor, {}),
        (fused.AdamW, {"master_weights": "split", "state_dtype": "int8", "stochastic_rounding": True, "seed": 3}),
    ):
        nets = [_model(options, None) for _ in range(3)]
        divided, again = (
            ZeroRedundancyOptimizer(net.parameters(), optimizer_class=cls, **options) for net in (nets[0], nets[2])
        )
        whole = cls(nets[1].parameters(), **options)
        for seed in range(2):
            _step(nets[0], divided, seed)
            _step(nets[1], whole, seed)
        divided.consolidate_state_dict(to=0)
        parts = [divided.state_dict() if rank == 0 else None]
        dist.broadcast_object_list(parts)
        with torch.no_grad():
            for p, q in zip(nets[2].parameters(), nets[0].parameters(), strict=True):
                p.copy_(q)
        again.load_state_dict(copy.deepcopy(parts[0]))
        if not options.get("stochastic_rounding"):  # whose random bits go by a parameter's place among those it has
            whole.load_state_dict(copy.deepcopy(parts[0]))
        for seed in range(2, 4):
            _step(nets[0], divided, seed)
            _step(nets[1], whole, seed)
            _step(nets[2], again, seed)
        for index, (p, q, r) in enumerate(zip(*(net.parameters() for net in nets), strict=True)):
            if not torch.equal(p, r) or not (options.get("stochastic_rounding") or torch.equal(p, q)):
                wrong.append(f"{cls.__name__} {options} parameter {index} under ZeroRedundancyOptimizer")
    return wrong


def _work(out: Path) -> list[str]:
    """What did not resume."""
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (WORLD,))
    wrong = []
    for number, (cls, options) in enumerate(FORMATS):
        for how in ("sharded", "flat", "full"):
            if how == "full" and cls is fused.SGD:
                continue  # no state: torch finds no device to broadcast from
            for sharding in (mesh, None):
                folder = f"{out}/{number}-{how}-{sharding is None}"
                if not _resumed(cls, options, sharding, how, folder):
                    wrong.append(f"{cls.__name__} {options} {how} {'whole' if sharding is None else 'sharded'}")
    wrong += _zero_redundancy(dist.get_rank())
    if not _whole_state_is_refused(mesh):
        wrong.append("a whole state was taken for a part")
    return wrong


@pytest.mark.slow
def test_distributed_checkpoints_resume_bit_for_bit(tmp_path: Path) -> None:
    assert in_two_processes(_work, tmp_path) == [[], []]
