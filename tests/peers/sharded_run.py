"""What tests/peers/test_processes.py has each of two processes do; a failure ends them all."""

import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import surgery

STEPS = 3
EPS = torch.finfo(torch.float32).eps


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6))  # 9 rows are shared out as 5 and 4


def injected() -> nn.Sequential:
    torch.manual_seed(1)
    config = surgery.LoraConfig(r=3, lora_alpha=6, target_modules=["0", "2"], init_lora_weights=False)
    return surgery.inject(net(), config)


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + rank))


def train(model: nn.Module, ranks: list[int]) -> None:
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    for step in range(STEPS):
        model(torch.cat([batch(step, rank) for rank in ranks])).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def sharded() -> nn.Sequential:
    model = injected()
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    held = model.state_dict()
    return {name: getattr(held[name], "full_tensor", held[name].clone)() for name in sorted(held)}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def assert_in_step(found: dict[str, Tensor]) -> None:
    """The same in each process to the bit, and that of one process with both batches, but for roundings."""
    for name, values in found.items():
        others = [torch.empty_like(values) for _ in range(2)]
        dist.all_gather(others, values.contiguous())
        assert torch.equal(*others), name
    one = injected()
    train(one, [0, 1])
    wanted = state(one)
    assert found.keys() == wanted.keys()
    for name, values in found.items():
        # Each step sums over at most 8 rows of 9 numbers, in another order.
        torch.testing.assert_close(values, wanted[name], rtol=0, atol=STEPS * 8 * 9 * EPS)


def run_data_parallel(rank: int, folder: Path) -> None:
    model = injected()
    train(DistributedDataParallel(model), [rank])
    assert_in_step(state(model))
    surgery.save(model, folder / f"ddp-{rank}")
    loaded = surgery.load(net(), folder / f"ddp-{rank}")
    assert_equal(state(loaded), state(model))


def run_sharded(rank: int, folder: Path) -> None:
    model = sharded()
    before = state(model)
    train(model, [rank])
    trained = state(model)
    assert_in_step(trained)
    assert any(not torch.equal(before[name], trained[name]) for name in before)
    surgery.save(model, folder / f"fsdp-{rank}")
    one = surgery.load(net(), folder / f"fsdp-{rank}")
    assert_equal(state(one), trained)

    model(batch(9, rank))  # leaves the last layers gathered, where a merge would be lost
    surgery.merge(model)
    surgery.merge(one)
    assert_equal(state(model), state(one))
    assert not torch.equal(state(one)["0.base_layer.weight"], trained["0.base_layer.weight"])
    x = batch(9, 0)
    torch.testing.assert_close(model(x), one(x), rtol=0, atol=2 * 9 * EPS)
    surgery.unmerge(model)
    assert_equal(state(model), trained)
    surgery.eject(model)
    assert_equal(state(model), state(net()))


def run_refusals(rank: int, folder: Path) -> None:
    model = sharded()
    surgery.save(model, folder / f"again-{rank}")
    model(batch(0, rank))
    config = surgery.LoraConfig(r=2, target_modules=["0"])
    with pytest.raises(surgery.StateError, match=r"0: each process holds a share .*; inject or load first, then fully"):
        surgery.inject(model, config, adapter_name="late")
    with pytest.raises(surgery.StateError, match="inject or load first"):
        surgery.load(model, folder / f"again-{rank}", adapter_name="late")
    bare = net()
    fully_shard(bare)
    with pytest.raises(surgery.StateError, match="inject or load first"):
        surgery.inject(bare, config)
    allotting = surgery.inject(net(), surgery.AdaLoraConfig(init_r=2, target_r=1, total_step=9, target_modules=["0"]))
    fully_shard(allotting)
    allotting(batch(0, rank)).sum().backward()
    with pytest.raises(surgery.StateError, match="train AdaLoRA without fully_shard"):
        surgery.adalora_step(allotting, 0)


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for run in (run_data_parallel, run_sharded, run_refusals):
        run(dist.get_rank(), Path(sys.argv[1]))
    print("all held")
    dist.destroy_process_group()
