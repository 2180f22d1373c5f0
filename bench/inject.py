"""Inject LoRA into 1,400 targets of a 200-layer model, against get_peft_model."""

import json

import peft

import surgery
from bench.thin import TARGETS, middle, seconds, thin_llama
from bench.words import times

ROUNDS = 5


def main() -> None:
    ours, theirs = [], []
    for _ in range(ROUNDS):
        model = thin_llama()
        config = surgery.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
        ours.append(seconds(lambda m=model, c=config: surgery.inject(m, c)))
        model = thin_llama()
        other = peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS)
        theirs.append(seconds(lambda m=model, c=other: peft.get_peft_model(m, c)))
    a, b = middle(ours), middle(theirs)
    print(json.dumps([["inject 1,400 targets", f"{a:.3f} s", f"{b:.3f} s", times(b / a), ">= 10 x"]]))


if __name__ == "__main__":
    main()
