"""Forward and backward of 24 linears with LoRA and with DoRA, against peft: hidden 1024, 4 x 256 tokens, r = 8.

The two models of a method take turns in one process.
"""

import copy
import json
from functools import partial

import peft
import torch
from torch import Tensor, nn

import surgery
from bench.thin import DEVICE, in_turn, middle, ratio, shuffle_adapters
from bench.words import ms

HIDDEN, LAYERS, BATCH, SEQ, RANK = 1024, 24, 4, 256, 8
ROUNDS = 25
FIELDS = {"r": RANK, "lora_alpha": 16, "target_modules": [str(index) for index in range(LAYERS)]}


def main() -> None:
    torch.manual_seed(0)
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
    took = in_turn({tool: partial(step, model, x) for tool, model in models.items()}, ROUNDS)
    ours, theirs = took["surgery"], took["peft"]
    method = "DoRA" if use_dora else "LoRA"
    what = f"forward and backward of {LAYERS} linears with {method}"
    return [what, ms(middle(ours)), ms(middle(theirs)), f"{ratio(ours, theirs):.2f}", "<= 0.9"]


def step(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward()
    model.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
