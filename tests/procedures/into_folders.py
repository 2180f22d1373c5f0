"""A plain base and an adapter over each of its sites, and bounds that let any merge pass."""

import math
from pathlib import Path

import torch
from checkpoint_folders import write_base
from quantized_folders import SHAPES, SITES, plain_weights
from torch import Tensor

ANY = {"min_retained": 0.0, "max_noise": math.inf}


def plain_base(folder: Path, shards: int = 1, dtype: torch.dtype = torch.bfloat16) -> Path:
    weights = {f"{site}.weight": weight for site, weight in plain_weights(dtype).items()}
    tensors = {"model.embed_tokens.weight": torch.arange(770.0).view(11, 70).to(dtype), **weights}
    tensors |= {"model.norm.weight": torch.ones(48).to(dtype), "lm_head.weight": torch.ones(11, 70).to(dtype)}
    return write_base(folder, tensors, shards, {"model_type": "llama", "dtype": "bfloat16"})


def factors() -> dict[str, Tensor]:
    drawn, found = torch.Generator().manual_seed(1), {}
    for site in SITES:
        out, in_features = SHAPES[site.rpartition(".")[2]]
        found[f"{site}.lora_A.weight"] = torch.randn(4, in_features, generator=drawn)
        found[f"{site}.lora_B.weight"] = torch.randn(out, 4, generator=drawn) / 64
    return found
