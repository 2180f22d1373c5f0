"""Forward and backward of 24 linears with LoRA and with DoRA, against peft: hidden 1024, 4 x 256 tokens, r = 8.

The two models of a method take turns in one process, in another order each round, so that a busy machine, and what
the one before left in the caches, slow each alike.
"""

import copy
import json
import random

import peft
import torch
from torch import Tensor, nn

import surgery
from bench.thin import DEVICE, middle, seconds, shuffle_adapters
from bench.words import ms

HIDDEN, LAYERS, BATCH, SEQ, RANK = 1024, 24, 4, 256, 8
ROUNDS = 25
FIELDS = {"r": RANK, "lora_alpha": 16, "target_modules": [str(index) for index in range(LAYERS)]}


def main() -> None:
    torch.manual_seed(0)
    random.seed(0)
    bare = nn.Sequential(*(nn.Linear(HIDDEN, HIDDEN) for _ in range(LAYERS))).to(DEVICE)
    x = torch.randn(BATCH, SEQ, HIDDEN, device=DEVICE)
    print(json.dumps([row(bare, x, use_dora) for use_dora in (False, True)]))


def row(bare: nn.Module, x: Tensor, use_dora: bool) -> list[str]:
    models = {
        "surgery": surgery.inject(copy.deepcopy(bare), surgery.LoraConfig(**FIELDS, use_dora=use_dora)),
        "peft": peft.get_peft_model(copy.deepcopy(bare), peft.LoraConfig(**FIELDS, use_dora=use_dora)),
    }
    for model in models.values():
        shuffle_adapters(model.train())
        step(model, x)
    times: dict[str, list[float]] = {tool: [] for tool in models}
    turns = list(models.items())
    for _ in range(ROUNDS):
        random.shuffle(turns)
        for tool, model in turns:
            times[tool].append(seconds(lambda m=model: step(m, x)))
    ours, theirs = middle(times["surgery"]), middle(times["peft"])
    method = "DoRA" if use_dora else "LoRA"
    what = f"forward and backward of {LAYERS} linears with {method}"
    return [what, ms(ours), ms(theirs), f"{ours / theirs:.2f}", "<= 0.9"]


def step(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward()
    model.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
