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
    "vera": lambda: surgery.VeraConfig(r=4, **TARGETS),
    "hra": lambda: surgery.HRAConfig(r=4, **TARGETS),
    "oft": lambda: surgery.OFTConfig(oft_block_size=5, **TARGETS),
    "coft": lambda: surgery.OFTConfig(oft_block_size=5, use_cayley_neumann=False, coft=True, **TARGETS),
    "road": lambda: surgery.RoadConfig(group_size=4, variant="road_4", **TARGETS),
    "boft": lambda: surgery.BOFTConfig(boft_block_size=5, **TARGETS),
    "beft": lambda: surgery.BeftConfig(**TARGETS),
    "trainable_tokens": lambda: surgery.TrainableTokensConfig(token_indices=[7, 0], **TARGETS),
    "miss": lambda: surgery.MissConfig(r=4, **TARGETS),
    "miss mini": lambda: surgery.MissConfig(r=5, mini_r=3, init_weights="mini", **TARGETS),
    "randlora": lambda: surgery.RandLoraConfig(r=4, randlora_alpha=8, **TARGETS),
    "shira": lambda: surgery.ShiraConfig(r=2, **TARGETS),
    "supertuning": lambda: surgery.SupertuningConfig(sparsity=0.5, r=4, **TARGETS),
    "c3a": lambda: surgery.C3AConfig(block_size=2, init_weights=True, **TARGETS),
    "vblora": lambda: surgery.VBLoRAConfig(r=4, num_vectors=7, vector_length=2, **TARGETS),
    "unilora": lambda: surgery.UniLoraConfig(r=4, theta_d_length=9, **TARGETS),
    "tinylora": lambda: surgery.TinyLoraConfig(u=5, **TARGETS),
    "fourierft": lambda: surgery.FourierFTConfig(n_frequency=30, init_weights=True, **TARGETS),
    "waveft": lambda: surgery.WaveFTConfig(n_frequency=30, wavelet_family="db2", **TARGETS),
    "delora": lambda: surgery.DeloraConfig(r=4, **TARGETS),
    "gralora": lambda: surgery.GraloraConfig(r=4, hybrid_r=2, **TARGETS),
    "glora": lambda: surgery.GloraConfig(r=4, **TARGETS),
    "glora vectors": lambda: surgery.GloraConfig(config_A_B="vector", config_C="vector", **TARGETS),
    "hira": lambda: surgery.HiraConfig(r=4, **TARGETS),
    "loha": lambda: surgery.LoHaConfig(r=4, alpha=12, use_effective_conv2d=True, **TARGETS),
    "lokr": lambda: surgery.LoKrConfig(r=1, alpha=3, use_effective_conv2d=True, **TARGETS),
}
EVERYWHERE = {  # besides a Linear
    "lora": ("conv1d", "convolution over two axes", "embedding"),
    "loha": ("convolution over two axes",),
    "lokr": ("convolution over one axis", "convolution in groups"),
}


class Net(nn.Module):
    """A layer of each kind, each adapted its own way: one graph, since it takes seconds to compile one."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        made = [*(("linear", one) for one in CONFIGS), *((op, one) for one, ops in EVERYWHERE.items() for op in ops)]
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
