"""Forward and backward of 24 linears with LoRA and with DoRA, against peft: hidden 1024, 4 x 256 tokens, r = 8.

All four models take turns in one process, so that a busy machine slows each alike.
"""

import copy
import json

import peft
import torch
from torch import Tensor, nn

import surgery
from bench.thin import DEVICE, middle, seconds, shuffle_adapters
from bench.words import ms

HIDDEN, LAYERS, BATCH, SEQ, RANK = 1024, 24, 4, 256, 8
ROUNDS = 9
FIELDS = {"r": RANK, "lora_alpha": 16, "target_modules": [str(index) for index in range(LAYERS)]}


def main() -> None:
    torch.manual_seed(0)
    bare = nn.Sequential(*(nn.Linear(HIDDEN, HIDDEN) for _ in range(LAYERS))).to(DEVICE)
    x = torch.randn(BATCH, SEQ, HIDDEN, device=DEVICE)
    models = {}
    for use_dora in (False, True):
        models["surgery", use_dora] = surgery.inject(
            copy.deepcopy(bare), surgery.LoraConfig(**FIELDS, use_dora=use_dora)
        )
        models["peft", use_dora] = peft.get_peft_model(
            copy.deepcopy(bare), peft.LoraConfig(**FIELDS, use_dora=use_dora)
        )
    times: dict[tuple[str, bool], list[float]] = {key: [] for key in models}
    for model in models.values():
        shuffle_adapters(model.train())
        step(model, x)
    for _ in range(ROUNDS):
        for key, model in models.items():
            times[key].append(seconds(lambda m=model: step(m, x)))
    print(json.dumps([row(times, use_dora) for use_dora in (False, True)]))


def step(model: nn.Module, x: Tensor) -> None:
    model(x).square().mean().backward()
    model.zero_grad(set_to_none=True)


def row(times: dict[tuple[str, bool], list[float]], use_dora: bool) -> list[str]:
    ours, theirs = (middle(times[tool, use_dora]) for tool in ("surgery", "peft"))
    method = "DoRA" if use_dora else "LoRA"
    what = f"forward and backward of {LAYERS} linears with {method}"
    return [what, ms(ours), ms(theirs), f"{ours / theirs:.2f}", "<= 0.9"]


if __name__ == "__main__":
    main()
