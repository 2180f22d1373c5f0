"""Kaiming's uniform start, with a = sqrt(5), as torch begins its layers and PEFT its factors."""

import torch
from torch import Tensor


def kaiming(shape: tuple[int, ...], inputs: int | None = None) -> Tensor:
    """Fresh numbers by how many each output is made of: `inputs`, or else all of a row."""
    values = torch.empty(shape)
    bound = max(1, values[:1].numel() if inputs is None else inputs) ** -0.5
    return values.uniform_(-bound, bound)
