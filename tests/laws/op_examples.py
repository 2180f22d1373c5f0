"""Modules for every op, all with a matrix [OUT, IN], and inputs of theirs; a new op is a line here."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from transformers.models.bart.modeling_bart import BartScaledWordEmbedding
from transformers.pytorch_utils import Conv1D

from surgery.core.op import Op
from surgery.core.site import Site, TensorInfo
from surgery.hosts.recognition import op_of

OUT, IN = 12, 10
GROUPED = "convolution in groups"

MODULES: Mapping[str, Callable[[bool], nn.Module]] = {
    "linear": lambda bias: nn.Linear(IN, OUT, bias=bias),
    "conv1d": lambda _bias: Conv1D(OUT, IN),
    "embedding": lambda _bias: nn.Embedding(IN, OUT),
    "scaled embedding": lambda _bias: BartScaledWordEmbedding(IN, OUT, 0, embed_scale=4.0),
    "attention": lambda bias: nn.MultiheadAttention(4, 2, bias=bias),  # its [12, 4] stands for any
    "convolution of one place": lambda bias: nn.Conv2d(10, OUT, 1, stride=(2, 1), bias=bias),
    "convolution over one axis": lambda bias: nn.Conv1d(
        2, OUT, 5, stride=2, padding=3, dilation=2, padding_mode="circular", bias=bias
    ),
    "convolution over two axes": lambda bias: nn.Conv2d(
        5, OUT, (1, 2), padding="same", dilation=3, padding_mode="reflect", bias=bias
    ),
    "convolution over three axes": lambda bias: nn.Conv3d(
        5, OUT, (2, 1, 1), stride=(1, 2, 1), padding=(1, 0, 2), bias=bias
    ),
    GROUPED: lambda bias: nn.Conv2d(10, OUT, (2, 1), padding="valid", groups=2, bias=bias),
}


def op_like(name: str) -> Op:
    op = op_of(MODULES[name](True))
    assert op is not None
    return op


EXAMPLES: Mapping[str, Op] = {name: op_like(name) for name in MODULES}


def stored_weight(module: nn.Module) -> Tensor:
    return module.in_proj_weight if isinstance(module, nn.MultiheadAttention) else module.weight


def site_of(op: Op) -> Site:
    stored = tuple(op.stored(torch.empty(OUT, IN)).shape)
    bias = TensorInfo("layer.bias", torch.float32, (OUT,))
    return Site("layer", {"weight": TensorInfo("layer.weight", torch.float32, stored), "bias": bias}, op)


def shape_given(op: Op, *batch: int) -> tuple[int, ...]:
    """Of an input; a convolution's has one batch axis alone, and five numbers or more along each other one."""
    if op.kernel:
        return (batch[0], op.channels(IN), *range(5, 5 + len(op.kernel)))
    return batch if op.name == "embedding" else (*batch, IN)


def beside(op: Op, bias: Tensor) -> Tensor:
    """A number for each output, as it broadcasts over the outcome."""
    return bias.view(-1, *(1 for _ in op.kernel))
