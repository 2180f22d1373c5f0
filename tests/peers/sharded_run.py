"""What tests/peers/test_processes.py has each of two processes do; a failure ends them all."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Shard
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

import surgery
from surgery.hosts.tree import injected as state_in

STEPS = 3
EPS = torch.finfo(torch.float32).eps
BOTH = {"target_modules": ["0", "2"]}
KINDS: dict[str, Callable[[], Any]] = {
    "lora": lambda: surgery.LoraConfig(r=3, lora_alpha=6, init_lora_weights=False, **BOTH),
    "dora": lambda: surgery.LoraConfig(r=3, use_dora=True, init_lora_weights=False, **BOTH),
    "lora_bias": lambda: surgery.LoraConfig(r=3, lora_bias=True, init_lora_weights=False, **BOTH),
    "ia3": lambda: surgery.IA3Config(feedforward_modules=["2"], init_ia3_weights=False, **BOTH),
    "adalora": lambda: surgery.AdaLoraConfig(init_r=3, target_r=2, total_step=9, **BOTH),
    "miss": lambda: surgery.MissConfig(r=4, init_weights=False, **BOTH),
    "loha": lambda: surgery.LoHaConfig(r=3, init_weights=False, **BOTH),
    "lokr": lambda: surgery.LoKrConfig(r=1, init_weights=False, **BOTH),
    "vera": lambda: surgery.VeraConfig(r=3, init_weights=False, **BOTH),
    "shira": lambda: surgery.ShiraConfig(r=2, init_weights=False, **BOTH),
    "supertuning": lambda: surgery.SupertuningConfig(sparsity=0.5, r=2, lora_alpha=1, **BOTH),
    "c3a": lambda: surgery.C3AConfig(block_size=3, **BOTH),
    "fourierft": lambda: surgery.FourierFTConfig(n_frequency=30, **BOTH),
    "waveft": lambda: surgery.WaveFTConfig(n_frequency=30, init_weights=False, **BOTH),
    "hira": lambda: surgery.HiraConfig(r=3, **BOTH),
    "delora": lambda: surgery.DeloraConfig(r=3, **BOTH),
    "glora": lambda: surgery.GloraConfig(r=3, **BOTH),
    "gralora": lambda: surgery.GraloraConfig(r=3, gralora_k=3, **BOTH),
}
ALLOTTING = {"init_r": 6, "target_r": 2, "tinit": 1, "tfinal": 2, "total_step": 9}
SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6))  # 9 rows are shared out as 5 and 4


def injected(kind: str = "lora", model: nn.Sequential | None = None, seed: int = 1) -> nn.Sequential:
    base = net() if model is None else model
    torch.manual_seed(seed)
    return surgery.inject(base, KINDS[kind]())


def in_shares(model: nn.Sequential, whole: bool = False) -> nn.Sequential:
    for layer in (model,) if whole else (model[0], model[2], model):
        fully_shard(layer)
    return model


def late(kind: str, rank: int, whole: bool) -> nn.Sequential:
    """Sharded, and only then injected; what each process draws is another, and process 0's counts."""
    model = in_shares(net(), whole)
    model(batch(9, rank))
    return injected(kind, model, seed=1 + rank)


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + rank))


def train(model: nn.Module, ranks: list[int]) -> None:
    optimizer = torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)
    for step in range(STEPS):
        model(torch.cat([batch(step, rank) for rank in ranks])).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def allot(run: nn.Module, model: nn.Module, ranks: list[int]) -> list[Any]:
    """Train AdaLoRA through its schedule; the masks after each step."""
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.02)
    masks = []
    for step in range(ALLOTTING["total_step"]):
        loss = run(torch.cat([batch(step, rank) for rank in ranks])).square().mean()
        (loss + surgery.orthogonal_loss(model)).backward()
        optimizer.step()
        surgery.adalora_step(model, step)
        optimizer.zero_grad()
        masks.append(state_in(model).configs["default"].rank_pattern)
    return masks


def state(model: nn.Module) -> dict[str, Tensor]:
    held = model.state_dict()
    return {name: getattr(held[name], "full_tensor", held[name].clone)().detach().clone() for name in sorted(held)}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def assert_in_step(found: dict[str, Tensor], kind: str = "lora") -> None:
    """The same in each process to the bit, and that of one process with both batches, but for roundings."""
    for name, values in found.items():
        others = [torch.empty_like(values) for _ in range(2)]
        dist.all_gather(others, values.contiguous())
        assert torch.equal(*others), name
    one = injected(kind)
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
    surgery.save(model, folder / "ddp")  # both write it, at once
    dist.barrier()
    loaded = surgery.load(net(), folder / "ddp")
    assert_equal(state(loaded), state(model))


def run_sharded(rank: int, folder: Path) -> None:
    for kind in KINDS:
        live_through(in_shares(injected(kind)), kind, rank, folder / f"fsdp-{kind}")


def run_late(rank: int, folder: Path) -> None:
    for kind in KINDS:
        for whole in (False, True):
            model = late(kind, rank, whole)
            assert_equal(state(model), state(injected(kind)))
            live_through(model, kind, rank, folder / f"late-{kind}-{whole}")


def live_through(model: nn.Sequential, kind: str, rank: int, folder: Path) -> None:
    """Trained, saved, loaded, merged, unmerged and ejected: all as in one process."""
    before = state(model)
    train(model, [rank])
    trained = state(model)
    assert_in_step(trained, kind)
    assert any(not torch.equal(before[name], trained[name]) for name in before)
    surgery.save(model, folder)
    one, shared = surgery.load(net(), folder), surgery.load(in_shares(net()), folder)
    assert_equal(state(one), trained)
    assert_equal(state(shared), trained)

    model(batch(9, rank))  # leaves the last layers gathered, where a merge would be lost
    for merged in (model, shared, one):
        surgery.merge(merged)
    assert_equal(state(model), state(one))
    assert_equal(state(shared), state(one))
    assert not torch.equal(state(one)["0.base_layer.weight"], trained["0.base_layer.weight"])
    x = batch(9, 0)
    torch.testing.assert_close(model(x), one(x), rtol=0, atol=2 * 9 * EPS)
    surgery.unmerge(model)
    assert_equal(state(model), trained)
    surgery.eject(model)
    assert_equal(state(model), state(net()))


def run_placements(*_: Any) -> None:
    """B lies in the rows of its weight, A in its columns; the rest is whole in each process."""
    for axis, placed in ((0, {"A": "R", "B": "S(0)"}), (1, {"A": "S(1)", "B": "R"})):
        model = nn.Sequential(nn.Linear(6, 4, bias=False))
        fully_shard(model, shard_placement_fn=lambda _, axis=axis: Shard(axis))
        surgery.inject(model, surgery.LoraConfig(r=2, target_modules=["0"]))
        for role, wanted in placed.items():
            (found,) = getattr(model[0], f"lora_{role}").default.weight.placements
            assert str(found) == wanted


def run_allotting(rank: int, folder: Path) -> None:
    """AdaLoRA's masks are those of one process, however the model is spread."""
    KINDS["allotted"] = lambda: surgery.AdaLoraConfig(**ALLOTTING, **BOTH)
    one = injected("allotted")
    wanted = allot(one, one, [0, 1])
    assert len({str(masks) for masks in wanted}) > 4
    model = injected("allotted")
    assert allot(DistributedDataParallel(model), model, [rank]) == wanted
    spread = [in_shares(injected("allotted"), whole) for whole in (False, True)]
    for model in (*spread, late("allotted", rank, False), late("allotted", rank, True)):
        assert allot(model, model, [rank]) == wanted
    surgery.save(model, folder / "allotted")
    loaded = surgery.load(net(), folder / "allotted")
    assert_equal(merged_weights(loaded), merged_weights(model))


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    surgery.merge(model)
    return {name: values for name, values in state(model).items() if "base_layer" in name}


def run_transformers(rank: int, folder: Path) -> None:
    """An adapter that is added to a sharded model of transformers: trained, saved, merged, swapped."""

    def llama() -> LlamaForCausalLM:
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**SMALL))

    def in_layers() -> Any:
        model = llama()
        for layer in model.model.layers:
            fully_shard(layer)
        return fully_shard(model)

    fields = {"r": 4, "target_modules": ["q_proj", "down_proj", "embed_tokens"], "init_lora_weights": False}
    model, tokens = surgery.inject(in_layers(), surgery.LoraConfig(**fields)), torch.arange(12).reshape(2, 6)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.01)
    model.train()(input_ids=tokens + rank, labels=tokens + rank).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    gathered = state(model)
    given = [{}, {"state_dict": gathered if rank == 0 else {}}]  # as accelerate gathers it
    places = [folder / "one", folder / "other"]
    for options, place in zip(given, places, strict=True):
        model.save_pretrained(place, is_main_process=rank == 0, **options)
    written = [(place / "adapter_model.safetensors").read_bytes() for place in places]
    assert written[0] == written[1]
    one = surgery.load(llama(), places[0])
    with torch.no_grad():
        assert_close_logits(model.eval()(tokens).logits, one(tokens).logits)
        model.save_merged(folder / "merged")
        plain = LlamaForCausalLM.from_pretrained(folder / "merged")
        surgery.merge(one)
        assert torch.equal(plain(tokens).logits, one(tokens).logits)
    other = surgery.inject(in_layers(), surgery.LoraConfig(**fields))
    other.load_adapter(places[0], "default", hotswap=True)
    assert_equal(state(other), state(model))
    swap_with_room(llama, in_layers, places[0], tokens)
    with pytest.raises(surgery.StateError, match="gathers only what its own rows need"):
        other(tokens, adapter_names=["default", "__base__"])


def swap_with_room(llama: Callable[[], Any], in_layers: Callable[[], Any], place: Path, tokens: Tensor) -> None:
    """As in one process, where the tensors that others take the place of are in shares too."""
    logits = []
    for make in (llama, in_layers):
        model = make()
        model.enable_peft_hotswap(target_rank=6)
        surgery.load(model, place)
        fresh = surgery.LoraConfig(r=6, target_modules=["q_proj"], init_lora_weights=False)
        torch.manual_seed(3)
        smaller = surgery.inject(llama(), fresh).get_adapter_state_dict()
        model.load_adapter(peft_config=fresh, adapter_state_dict=smaller)
        with torch.no_grad():
            logits.append(model.eval()(tokens).logits)
    assert_close_logits(logits[1], logits[0])


def run_class(*_: Any) -> None:
    """A model that was sharded after its injection has its own class again, and fully_shard's, once it is ejected."""
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    surgery.inject(model, surgery.LoraConfig(r=2, target_modules=["q_proj"]))
    fully_shard(model)
    assert "FSDP" in type(model).__name__
    surgery.eject(model)
    assert isinstance(model, FSDPModule)
    assert isinstance(model, LlamaForCausalLM)
    assert type(model).__name__ == "FSDPLlamaForCausalLM"
    assert not any("surgery" in kind.__module__ or hasattr(kind, "save_merged") for kind in type(model).__mro__)
    assert model(torch.arange(6)[None]).logits.shape == (1, 6, 99)
    surgery.inject(model, surgery.LoraConfig(r=2, target_modules=["q_proj"]))
    assert model.active_adapters() == ["default"]


def assert_close_logits(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=0, atol=64 * EPS * float(wanted.abs().max()))


def run_refusals(*_: Any) -> None:
    config = {"r": 2, "target_modules": ["0"]}
    for options in ({"modules_to_save": ["2"]}, {"bias": "all"}):
        model = in_shares(net())
        before = state(model)
        with pytest.raises(
            surgery.StateError, match=r"each process holds a share .*; inject or load first, then fully"
        ):
            surgery.inject(model, surgery.LoraConfig(**config, **options))
        assert_equal(state(model), before)
    attention = fully_shard(nn.Sequential(nn.MultiheadAttention(8, 2)))
    with pytest.raises(surgery.StateError, match="which its module reads by itself; inject or load first"):
        surgery.inject(attention, surgery.LoraConfig(**config))
    mesh = init_device_mesh("cpu", (2,))
    with pytest.raises(surgery.StateError, match="not by fully_shard over one axis"):
        surgery.inject(parallelize_module(net(), mesh, {"0": ColwiseParallel()}), surgery.LoraConfig(**config))
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    with pytest.raises(surgery.StateError, match="not by fully_shard over one axis"):
        surgery.inject(fully_shard(net(), mesh=mesh), surgery.LoraConfig(**config))


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    runs = (
        run_data_parallel,
        run_sharded,
        run_late,
        run_placements,
        run_allotting,
        run_transformers,
        run_class,
        run_refusals,
    )
    for run in runs:
        run(dist.get_rank(), Path(sys.argv[1]))
    print("all held")
    dist.destroy_process_group()
