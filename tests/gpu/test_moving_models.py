"""Models that move between a CPU and a GPU: before an adapter is laid, while it runs, and while it is merged."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from device import DEVICE, held, here, there
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import surgery
from surgery.procedures.checking.outputs import run as outputs_of
from surgery.testing import assert_equivalent


class Net(nn.Module):
    """An embedding, a transposed and a plain linear layer, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.turned, self.up = nn.Embedding(11, 24), Conv1D(32, 24), nn.Linear(32, 20)
        self.conv, self.head = nn.Conv2d(20, 16, 3, padding=1), nn.Linear(16, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.up(self.turned(self.rows(tokens)).tanh()).tanh()  # [batch, seq, 20]
        x = self.conv(x.view(*tokens.shape[:1], -1, tokens.shape[1], 1)).tanh()  # [batch, 16, seq, 1]
        out: Tensor = self.head(x.mean((2, 3)))
        return out


LINEARS = {"target_modules": ["turned", "up", "head"]}
CONFIGS: dict[str, Any] = {
    "lora": surgery.LoraConfig(r=4, lora_alpha=8, target_modules=["rows", "turned", "up", "conv"]),
    "dora": surgery.LoraConfig(r=4, use_dora=True, target_modules=["rows", "turned", "up", "conv"]),
    "lora_bias": surgery.LoraConfig(r=4, lora_bias=True, bias="all", **LINEARS),
    "tokens and a head": surgery.LoraConfig(
        r=4, trainable_token_indices={"rows": [3, 7]}, modules_to_save=["head"], target_modules=["up"]
    ),
    "ia3": surgery.IA3Config(feedforward_modules=["up"], target_modules=["turned", "up", "conv"]),
    "adalora": surgery.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["turned", "up"]),
    "loha": surgery.LoHaConfig(r=4, target_modules=["up", "conv"], use_effective_conv2d=True),
    "lokr": surgery.LoKrConfig(r=2, target_modules=["up", "conv", "head"]),
    "vera": surgery.VeraConfig(r=4, **LINEARS),
    "randlora": surgery.RandLoraConfig(r=4, randlora_alpha=4, **LINEARS),
}
each_config = pytest.mark.parametrize("name", CONFIGS)
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
TOKENS = torch.arange(24).remainder(11).view(4, 6)


def net(dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(0)
    return Net().to(dtype).eval()


def trained(model: Any) -> Any:
    """With an adapter that has something to do; of the same numbers wherever it lies."""
    torch.manual_seed(1)
    with torch.no_grad():
        for values in model.parameters():
            if values.requires_grad:
                values.add_(there_of(values, torch.randn(values.shape) / 8))
    return model


def there_of(like: Tensor, values: Tensor) -> Tensor:
    return values.to(like.device, like.dtype)


def run(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(tokens.to(next(model.parameters()).device))
    return out


def places(model: nn.Module) -> set[str]:
    return {values.device.type for values in [*model.parameters(), *model.buffers()]}


@each_config
@each_dtype
def test_a_fresh_adapter_there_changes_nothing(name: str, dtype: torch.dtype) -> None:
    model = there(net(dtype))
    before = run(model)
    surgery.inject(model, CONFIGS[name])
    assert torch.equal(run(model), before)
    assert places(model) == {torch.device(DEVICE).type}


@each_config
@each_dtype
def test_it_runs_the_same_whether_it_was_laid_here_or_there(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = trained(surgery.inject(net(dtype), CONFIGS[name]))
    surgery.save(model, tmp_path / "adapter")
    before, out = held(model), run(model)
    assert_equivalent(model, lambda x: here(there(copy.deepcopy(model))(there(x))), TOKENS)
    moved = run(there(model))
    assert places(model) == {torch.device(DEVICE).type}
    laid = surgery.load(there(net(dtype)), tmp_path / "adapter")
    assert torch.equal(run(laid), moved)
    surgery.save(laid, tmp_path / "again")
    files = [folder / "adapter_model.safetensors" for folder in (tmp_path / "adapter", tmp_path / "again")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert held(model.cpu()) == before
    assert torch.equal(run(model), out)


@each_config
@each_dtype
@pytest.mark.parametrize("undo", ["index", "copy"])
@pytest.mark.parametrize("way", ["there", "there and back", "here and there"])
def test_a_merge_is_undone_to_the_bit_wherever_the_model_has_moved(
    name: str, dtype: torch.dtype, undo: Any, way: str
) -> None:
    model = trained(surgery.inject(net(dtype), CONFIGS[name]))
    before, wanted = held(model), held(surgery.merge(copy.deepcopy(model)))
    model = model if way.startswith("here") else there(model)
    surgery.merge(model, undo=undo)
    assert held(model) == wanted
    model = model if way == "there" else model.cpu() if way.startswith("there") else there(model)
    assert held(model) == wanted
    assert held(surgery.unmerge(model)) == before
    surgery.merge(model, undo=undo)
    assert held(model) == wanted
    surgery.eject(model)
    assert held(model) == held(net(dtype))


@each_config
def test_adapted_is_merged_on_the_device(name: str) -> None:
    model = there(trained(surgery.inject(net(), CONFIGS[name])))
    merged = surgery.eject(surgery.merge(copy.deepcopy(model)), keep_merged=True)
    assert_equivalent(model, merged, there(TOKENS), base=there(net()))


@pytest.mark.parametrize("arithmetic", ["peft", "peft-safe"])
@each_dtype
def test_a_merge_as_peft_is_undone_there(arithmetic: str, dtype: torch.dtype) -> None:
    model = there(trained(surgery.inject(net(dtype), CONFIGS["lora"])))
    before = held(model)
    surgery.merge(model, arithmetic=arithmetic)
    assert held(model) != before
    assert held(surgery.unmerge(model)) == before


def test_adapters_are_switched_disabled_and_mixed_there() -> None:
    model = there(net())
    for name in ("lora", "dora", "ia3"):
        surgery.inject(model, CONFIGS[name], adapter_name=name)
        surgery.set_adapter(model, name)
        trained(model)
    alone = {}
    for name in ("lora", "dora", "ia3"):
        surgery.set_adapter(model, name)
        alone[name] = run(model)
    with surgery.disable_adapters(model):
        alone["__base__"] = run(model)
        assert torch.equal(alone["__base__"], run(there(net())))
    rows = ["dora", "__base__", "ia3", "lora"]
    with surgery.mixed_batch(model, rows):
        mixed = run(model)
    # Sums of up to 180 terms in four layers, in whatever order kernels for other batches take them.
    room = 4 * 180 * torch.finfo(torch.float32).eps
    for row, name in enumerate(rows):
        assert float((mixed[row] - alone[name][row]).abs().max()) <= room * float(alone[name].abs().max())
        assert float((mixed[row] - alone[rows[row - 1]][row]).abs().max()) > 10 * room
    surgery.set_adapter(model, ["lora", "ia3"])
    wanted = run(model)
    merged = run(surgery.merge(model))
    assert float((merged - wanted).abs().max()) <= room * float(wanted.abs().max())


def test_adalora_allots_ranks_there_and_its_progress_moves() -> None:
    model = there(
        surgery.inject(
            net(),
            surgery.AdaLoraConfig(
                init_r=4, target_r=2, tinit=1, tfinal=2, total_step=8, target_modules=["turned", "up"]
            ),
        )
    )
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=0.05)
    for step in range(8):
        loss = model(there(TOKENS)).square().mean() + surgery.orthogonal_loss(model)
        loss.backward()
        optimizer.step()
        surgery.adalora_step(model, step)
        optimizer.zero_grad()
    left = [int((values != 0).sum()) for name, values in model.named_parameters() if "lora_E" in name]
    assert sum(left) == 4
    before = held(model)
    assert held(surgery.unmerge(surgery.merge(model))) == before


class Drawing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        drawn: Tensor = self.linear(x) + torch.rand(4, device=x.device)
        return drawn


def test_what_a_model_draws_there_is_the_same_in_each_run_and_leaves_the_generator_as_it_was() -> None:
    model, x = there(Drawing()), there(torch.ones(1, 4))
    first = outputs_of(model, x).outputs["output"]
    torch.manual_seed(3)
    wanted = torch.rand(4, device=DEVICE)
    torch.manual_seed(3)
    assert torch.equal(outputs_of(model, x).outputs["output"], first)
    assert torch.equal(torch.rand(4, device=DEVICE), wanted)
