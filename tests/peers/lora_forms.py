"""The kinds of layers and the forms of LoRA that lora_table.py crosses: a new one is a line of a table here."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch
from corda_of_peft import CordaConfig, preprocess_corda
from peft import LoraGAConfig
from peft.tuners.lora.loraga import preprocess_loraga
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class Held(nn.Module):
    """A matrix, or a stack of them, that its module reads by itself."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.held = nn.Parameter(torch.randn(shape) / 4)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.held.mT


class Layer(NamedTuple):
    """A kind of layer, an input of it, and what else a config says of it."""

    made: Callable[[], nn.Module]
    given: Callable[[], Tensor]
    fields: Mapping[str, Any] = {"target_modules": ["layer"]}
    run: Callable[[nn.Module, Tensor], Any] = lambda module, x: module(x)


class Net(nn.Module):
    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.layer, self.run = layer.made(), layer.run
        self.head = nn.Linear(12, 16)  # without one, an embedding in files is taken for the output head too

    def forward(self, x: Tensor) -> Any:
        return self.run(self.layer, x)


class Beside(Net):
    """What it gives shows its head, and rows of tokens, too."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.rows = nn.Embedding(16, 12)

    def forward(self, x: Tensor) -> Any:
        return super().forward(x) + self.head(self.rows(torch.arange(16, device=x.device))).mean()


class Told(SimpleNamespace):
    """A model's config, as peft asks for it."""

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Layered(nn.Module):
    """A list of layers, where PEFT looks for it."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        self.config = Told(num_hidden_layers=2)
        self.layers = nn.ModuleList(Net(layer) for _ in range(2))

    def forward(self, x: Tensor) -> Any:
        return sum(layer(x) for layer in self.layers)


@contextmanager
def linears_as_gptq() -> Iterator[None]:
    """peft takes every nn.Linear for a layer of GPTQ, over which alone it heeds use_qalora."""
    layers = ModuleType("gptqmodel.nn_modules.qlinear")
    vars(layers)["BaseQuantLinear"] = nn.Linear
    with (
        mock.patch.dict("sys.modules", {layers.__name__: layers}),
        mock.patch("peft.tuners.lora.gptq.is_gptqmodel_available", return_value=True),
        mock.patch.object(nn.Linear, "qweight", torch.empty(0), create=True),
    ):
        yield


Loss = Callable[[Any, Tensor], Tensor]


def loss(outcome: Tensor, given: Tensor) -> Tensor:
    """Of what a layer gives, for those that start from gradients."""
    return (outcome - given.mean()).square().mean()


def corda_of_peft(model: nn.Module, config: Any, x: Tensor) -> None:
    config.corda_config = CordaConfig()
    preprocess_corda(model, config, lambda: model(x))


def lora_ga_of_peft(model: nn.Module, config: Any, x: Tensor) -> None:
    config.lora_ga_config = LoraGAConfig()
    preprocess_loraga(model, config, lambda: loss(model(x), x).backward())


class Form(NamedTuple):
    """What a config says besides, the kinds of layers that refuse it, each with what is said, and what it needs."""

    fields: Mapping[str, Any]
    refused: Mapping[str, str] = {}
    start: str | None = None  # of init_lora_weights, where that is what it is about
    net: Callable[[Layer], nn.Module] = Net
    unmerged: str = ""  # why it is not merged, if it is not
    peft: Callable[[], AbstractContextManager[None]] = nullcontext
    seen: Callable[[nn.Module, Any, Tensor], None] | None = None  # what peft does with an example, where one is needed
    loss: Loss | None = None


PARAMETER = {"target_modules": [], "target_parameters": ["layer.held"]}
APART = {"target_modules": [], "target_parameters": [f"layer.{one}_proj_weight" for one in "qkv"]}
PARAMETERS = (
    "nn.Parameter of two axes",
    "nn.Parameter of three axes",
    "nn.MultiheadAttention with `kdim` and `vdim`, by `target_parameters`",
)
LAYERS: Mapping[str, Layer] = {
    "nn.Linear": Layer(lambda: nn.Linear(16, 12), lambda: torch.randn(64, 16)),
    "Conv1D of transformers": Layer(lambda: Conv1D(12, 16), lambda: torch.randn(64, 16)),
    "nn.Embedding": Layer(lambda: nn.Embedding(16, 12), lambda: torch.randint(0, 16, (64,))),
    "nn.Conv1d": Layer(lambda: nn.Conv1d(6, 12, 3, stride=2), lambda: torch.randn(16, 6, 9)),
    "nn.Conv2d": Layer(lambda: nn.Conv2d(6, 12, (2, 3), padding=1), lambda: torch.randn(8, 6, 5, 5)),
    "nn.Conv3d": Layer(lambda: nn.Conv3d(6, 12, 2), lambda: torch.randn(8, 6, 3, 3, 3)),
    "nn.MultiheadAttention": Layer(
        lambda: nn.MultiheadAttention(16, 2, batch_first=True),
        lambda: torch.randn(16, 4, 16),
        run=lambda module, x: module(x, x.flip(1), x, need_weights=False)[0],
    ),
    PARAMETERS[0]: Layer(lambda: Held(12, 16), lambda: torch.randn(64, 16), PARAMETER),
    PARAMETERS[1]: Layer(lambda: Held(3, 12, 16), lambda: torch.randn(3, 32, 16), PARAMETER),
    PARAMETERS[2]: Layer(
        lambda: nn.MultiheadAttention(16, 2, kdim=12, vdim=8, batch_first=True),
        lambda: torch.randn(16, 4, 16),
        APART,
        lambda module, x: module(x, x[..., :12], x[..., 8:], need_weights=False)[0],
    ),
}
LINEARS = ("nn.Linear", "Conv1D of transformers")
STARTED = dict.fromkeys(PARAMETERS, "it goes without use_dora, target_parameters")  # as a part of the base
OF_EXAMPLES = {name: "is for Linear and Conv1D" for name in LAYERS if name not in LINEARS}
FORMS: Mapping[str, Form] = {
    "LoRA": Form({}),
    "rsLoRA": Form({"use_rslora": True}),
    "DoRA": Form(
        {"use_dora": True},
        {"nn.MultiheadAttention": "DoRA is supported over"} | dict.fromkeys(PARAMETERS, "use_dora"),
    ),
    "`lora_bias`": Form(
        {"lora_bias": True},
        dict.fromkeys(("nn.Embedding", "nn.MultiheadAttention"), "lora_bias is supported over")
        | dict.fromkeys(PARAMETERS, "lora_bias"),
    ),
    '`bias="all"`': Form({"bias": "all"}, dict.fromkeys(PARAMETERS, "bias 'none' alone"), net=Beside),
    '`bias="lora_only"`': Form({"bias": "lora_only"}, dict.fromkeys(PARAMETERS, "bias 'none' alone"), net=Beside),
    "`trainable_token_indices`": Form({"trainable_token_indices": {"rows": [3, 7]}}, net=Beside),
    "BD-LoRA": Form(
        {"use_bdlora": {"target_modules_bd_a": ["layer"], "nblocks": 2}},
        {name: "use_bdlora is for Linear and Conv1D" for name in LAYERS if name not in LINEARS}
        | dict.fromkeys(PARAMETERS, "use_bdlora is given; as in PEFT it goes without"),
    ),
    "QALoRA": Form(
        {"use_qalora": True, "qalora_group_size": 4},
        {name: "use_qalora is for Linear" for name in LAYERS if name != LINEARS[0]}
        | dict.fromkeys(PARAMETERS, "use_qalora is given; as in PEFT it goes without"),
        peft=linears_as_gptq,
    ),
    "PiSSA": Form({}, STARTED, "pissa"),
    "OLoRA": Form({}, STARTED, "olora"),
    "CorDA": Form({}, OF_EXAMPLES | STARTED, "corda", seen=corda_of_peft),
    "LoRA-GA": Form({}, OF_EXAMPLES | STARTED, "lora_ga", seen=lora_ga_of_peft, loss=loss),
    "`layer_replication`": Form({"layer_replication": [[0, 2], [1, 2]]}, net=Layered, unmerged="share one weight"),
    "patterns": Form({"rank_pattern": {".*layer.*": 2}, "alpha_pattern": {".*layer.*": 7}}),
}
