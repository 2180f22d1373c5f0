"""What adapters add to the forward pass of the thin model, against peft: 1 x 16 tokens, r = 8, no_grad."""

import copy
import json

import peft
import torch

import surgery
from bench.thin import DEVICE, TARGETS, middle, seconds, shuffle_adapters, thin_llama
from bench.words import ms

ROUNDS = 15 if DEVICE == "cuda" else 40


def main() -> None:
    bare = thin_llama()
    ours = surgery.inject(copy.deepcopy(bare), surgery.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    theirs = peft.get_peft_model(
        copy.deepcopy(bare), peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
    ).eval()
    shuffle_adapters(ours)
    shuffle_adapters(theirs)
    tokens = torch.arange(16, device=DEVICE)[None]  # [batch, seq]
    models = {"bare": bare, "ours": ours, "peft": theirs}
    times: dict[str, list[float]] = {name: [] for name in models}
    with torch.no_grad():
        for _ in range(ROUNDS):
            for name, model in models.items():
                times[name].append(seconds(lambda m=model: m(tokens)))
    took = {name: middle(values) for name, values in times.items()}
    added, peft_added = took["ours"] - took["bare"], took["peft"] - took["bare"]
    what = f"added to a forward pass of {ms(took['bare'])}"
    print(json.dumps([[what, ms(added), ms(peft_added), f"{added / peft_added:.2f}", "<= 0.6"]]))


if __name__ == "__main__":
    main()
