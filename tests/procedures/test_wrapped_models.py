"""What torch.compile, DataParallel and DDP put around a model: adapters are those of the model within."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import distributed, nn

import surgery

X = torch.arange(8, dtype=torch.float32).reshape(2, 4)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def config() -> surgery.LoraConfig:
    return surgery.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)


WRAPPERS: dict[str, Callable[[nn.Module], Any]] = {
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "parallel": nn.DataParallel,
    "both": lambda model: torch.compile(nn.DataParallel(model), backend="eager"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_every_call_on_a_wrapped_model_is_one_on_the_model_within(wrapper: str, tmp_path: Path) -> None:
    plain, around = net(), WRAPPERS[wrapper](net())
    base = around(X)
    torch.manual_seed(1)
    surgery.inject(plain, config())
    torch.manual_seed(1)
    assert surgery.inject(around, config()) is around
    assert torch.equal(around(X), plain(X))
    assert not torch.equal(around(X), base)
    for model, name in ((plain, "plain"), (around, "around")):
        surgery.save(model, tmp_path / name)
        surgery.load(model, tmp_path / "plain", adapter_name="b")
    with safe_open(tmp_path / "plain" / "adapter_model.safetensors", "pt") as file:
        names = list(file.keys())
    with safe_open(tmp_path / "around" / "adapter_model.safetensors", "pt") as file:
        assert list(file.keys()) == names
    with surgery.disable_adapters(around):
        assert torch.equal(around(X), base)
    surgery.set_adapter(around, "b")
    with surgery.mixed_batch(around, ["default", "__base__"]):
        assert torch.equal(around(X)[1], base[1])
    assert [row.name for row in surgery.inspect(around).rows] == [row.name for row in surgery.inspect(plain).rows]
    surgery.unmerge(surgery.merge(around))
    surgery.eject(around)
    assert torch.equal(around(X), base)
    assert [name for name, _ in around.named_modules()] == [
        name for name, _ in WRAPPERS[wrapper](net()).named_modules()
    ]


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A group of one process."""
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("alone")
def test_ddp_takes_no_adapter_that_it_would_not_keep_in_step(tmp_path: Path) -> None:
    """What it exchanges was settled when it was made."""
    model = surgery.inject(net(), config())
    around = nn.parallel.DistributedDataParallel(model)
    surgery.save(around, tmp_path)
    for wrapped in (around, torch.compile(around, backend="eager")):
        with pytest.raises(surgery.StateError, match="wrap that anew"):
            surgery.inject(wrapped, config(), adapter_name="b")
    with pytest.raises(surgery.StateError, match="wrap that anew"):
        surgery.load(around, tmp_path, adapter_name="b", trainable=True)
    surgery.load(around, tmp_path, adapter_name="b")
    surgery.set_adapter(around, "b")
    assert torch.equal(around(X), model(X))
