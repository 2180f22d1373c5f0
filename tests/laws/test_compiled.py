"""What torch's own compiler makes of adapted layers: the outputs and gradients that they give without it."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from op_examples import MODULES, shape_given
from torch import Tensor, nn

import surgery
from surgery.hosts.recognition import op_of

TARGETS: dict[str, Any] = {"target_modules": ["layer"]}
CONFIGS: Mapping[str, Callable[[], Any]] = {
    "lora": lambda: surgery.LoraConfig(r=4, lora_alpha=12, **TARGETS),
    "lora_bias": lambda: surgery.LoraConfig(r=4, lora_alpha=12, lora_bias=True, **TARGETS),
    "dora": lambda: surgery.LoraConfig(r=4, lora_alpha=12, use_dora=True, **TARGETS),
    "pissa": lambda: surgery.LoraConfig(r=4, lora_alpha=12, init_lora_weights="pissa", **TARGETS),
    "qalora": lambda: surgery.LoraConfig(r=4, lora_alpha=12, use_qalora=True, qalora_group_size=2, **TARGETS),
    "ia3": lambda: surgery.IA3Config(feedforward_modules=["layer"], **TARGETS),
    "adalora": lambda: surgery.AdaLoraConfig(init_r=4, target_r=2, lora_alpha=12, total_step=9, **TARGETS),
    "miss": lambda: surgery.MissConfig(r=4, **TARGETS),
    "miss mini": lambda: surgery.MissConfig(r=5, mini_r=3, init_weights="mini", **TARGETS),
    "shira": lambda: surgery.ShiraConfig(r=2, **TARGETS),
    "c3a": lambda: surgery.C3AConfig(block_size=2, init_weights=True, **TARGETS),
}
EVERYWHERE = ("conv1d", "convolution over two axes", "embedding")  # of LoRA


class Net(nn.Module):
    """A layer of each kind, each adapted its own way: one graph, since it takes seconds to compile one."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        made = [*(("linear", one) for one in CONFIGS), *((op, "lora") for op in EVERYWHERE)]
        self.parts = nn.ModuleList(nn.ModuleDict({"layer": MODULES[op](True).to(dtype)}) for op, _ in made)
        self.given = [example(part["layer"], dtype) for part in self.parts]
        for part, (_, config) in zip(self.parts, made, strict=True):
            surgery.inject(part, CONFIGS[config]())

    def forward(self) -> list[Tensor]:
        return [part["layer"](x) for part, x in zip(self.parts, self.given, strict=True)]


def example(layer: nn.Module, dtype: torch.dtype) -> Tensor:
    op = op_of(layer)
    assert op is not None
    shape = shape_given(op, 6)
    return torch.randint(0, 10, shape) if op.name == "embedding" else torch.randn(shape, dtype=dtype)


def test_no_sum_with_a_factor_is_left_to_it() -> None:
    """torch 2.13 makes one product of such a sum and the product in it, and forgets the factor."""
    sums: list[Any] = []

    def watched(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        sums.extend(node for node in graph.graph.nodes if node.target in {torch.add, torch.sub})
        return graph.forward

    model = Net(torch.float32)
    for wanted, found in zip(model(), torch.compile(model, fullgraph=True, backend=watched)(), strict=True):
        assert torch.equal(wanted, found)
    assert not [node for node in sums if "alpha" in node.kwargs]


@pytest.mark.slow
def test_the_outputs_and_gradients_are_those_that_it_gives_without() -> None:
    torch.manual_seed(0)
    model = Net(torch.float32)
    fitted = [values for values in model.parameters() if values.requires_grad]
    with torch.no_grad():
        for values in fitted:
            values.add_(torch.randn_like(values) / 2)
    found = []
    for run in (model, torch.compile(model, fullgraph=True)):
        outputs = run()
        gradients = torch.autograd.grad(sum(out.square().sum() for out in outputs), fitted)
        found.append([*(out.detach() for out in outputs), *gradients])
    for wanted, compiled in zip(*found, strict=True):
        # Sums of some 10 terms, of 4, and of 6 rows; each rounded, in another order.
        room = 2 * (10 + 4 + 6) * torch.finfo(torch.float32).eps * float(wanted.abs().max())
        assert float((wanted - compiled).abs().max()) <= room
