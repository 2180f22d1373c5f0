"""Forward and backward of 24 linears in nf4 with LoRA, against peft: bitsandbytes' layers, hidden 1024, 4 x 256 tokens.

Both take turns in one process; then the same without gradients.
"""

import copy
import json
from collections.abc import Callable
from functools import partial

import peft
import torch
from torch import Tensor, nn

import surgery
from bench.thin import DEVICE, in_turn, middle, ratio, shuffle_adapters
from bench.train import FIELDS, HIDDEN, LAYERS, step
from bench.words import ms

BATCH, SEQ, ROUNDS = 4, 256, 9


def main() -> None:
    torch.manual_seed(0)
    bare = nn.Sequential(*(nn.Linear(HIDDEN, HIDDEN, bias=False, dtype=torch.bfloat16) for _ in range(LAYERS)))
    base = surgery.quantize(bare.to(DEVICE), "nf4", double_quant=True)
    x = torch.randn(BATCH, SEQ, HIDDEN, dtype=torch.bfloat16, device=DEVICE)
    ours = surgery.inject(copy.deepcopy(base), surgery.LoraConfig(**FIELDS))
    theirs = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(**FIELDS))
    models = {"surgery": ours, "peft": theirs}
    for model in models.values():
        shuffle_adapters(model.train())
        step(model, x)
    print(json.dumps([row(models, x, "training step", step), row(models, x, "forward", forward)]))


def forward(model: nn.Module, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def row(models: dict[str, nn.Module], x: Tensor, what: str, run: Callable[[nn.Module, Tensor], None]) -> list[str]:
    took = in_turn({tool: partial(run, model, x) for tool, model in models.items()}, ROUNDS)
    ours, theirs = took["surgery"], took["peft"]
    told = f"{what} of {LAYERS} nf4 linears with LoRA"
    return [told, ms(middle(ours)), ms(middle(theirs)), f"{ratio(ours, theirs):.2f}", "<= 1"]


if __name__ == "__main__":
    main()
