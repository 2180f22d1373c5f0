"""Load an adapter of 1,400 targets onto a 200-layer model, against PeftModel.from_pretrained."""

import json
import tempfile
from pathlib import Path

import peft

import surgery
from bench.thin import TARGETS, middle, seconds, shuffle_adapters, thin_llama
from bench.words import times

ROUNDS = 5


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps([measured(Path(folder))]))


def measured(folder: Path) -> list[str]:
    model = peft.get_peft_model(thin_llama(), peft.LoraConfig(r=8, lora_alpha=16, target_modules=TARGETS))
    shuffle_adapters(model)
    model.save_pretrained(folder)
    ours, theirs = [], []
    for _ in range(ROUNDS):
        bare = thin_llama()
        ours.append(seconds(lambda m=bare: surgery.load(m, folder)))
        bare = thin_llama()
        theirs.append(seconds(lambda m=bare: peft.PeftModel.from_pretrained(m, folder)))
    a, b = middle(ours), middle(theirs)
    return ["load an adapter of 1,400 targets", f"{a:.3f} s", f"{b:.3f} s", times(b / a), ">= 5 x"]


if __name__ == "__main__":
    main()
