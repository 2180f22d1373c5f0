"""A QLoRA over a real model in nf4, trained on plainly and quantization-aware, and what is left of each in nf4.

A merge into the base's own 4-bit codes and scales loses what is below half a step of them. The aware adapter runs as
it will after that, so that what it was trained to be is what is left.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from demo import Pairs, Score, embed, loaded, model_folder, pairs, score
from torch import nn
from torch.nn import functional as F

import surgery

PAIRS, BATCH, TEMPERATURE = 128, 32, 0.05
CONFIG = surgery.LoraConfig(r=8, lora_alpha=16, target_modules=["query", "value"])


def main() -> None:
    tokenizer, model = loaded(model_folder())
    surgery.quantize(model, "nf4", skip=["key", "dense"])  # no more than is adapted, for a CPU is slow with 4 bits
    with tempfile.TemporaryDirectory() as folder:
        base, start = Path(folder) / "base", Path(folder) / "start"
        model.save_pretrained(base)
        torch.manual_seed(0)
        surgery.save(train(surgery.inject(model, CONFIG), tokenizer, 6, 2e-3), start)
        plain = went_on(base, start, tokenizer, None, Path(folder) / "plain")
        aware = went_on(base, start, tokenizer, "nf4", Path(folder) / "aware")
    assert plain[1] != plain[0]
    assert aware[1] == aware[0]
    print("merged into nf4, the quantization-aware adapter is what it was")


def went_on(base: Path, start: Path, tokenizer: Any, aware: str | None, out: Path) -> tuple[Score, Score]:
    """The scores of the adapter at `start` after some more training, and once it is merged into the codes."""
    torch.manual_seed(1)
    held_out, model = pairs("pairs_held_out.jsonl"), surgery.load_model(base)
    surgery.inject(model, CONFIG, quantization_aware=aware)
    model.load_adapter(start, "default", hotswap=True)  # into the adapter that is there
    train(model, tokenizer, 4, 1e-3)
    before = score(model, tokenizer, held_out)
    surgery.save(model, out / "adapter")
    report = surgery.merge_checkpoint(base, out / "adapter", out / "merged", into="keep", min_retained=0, max_noise=9)
    after = score(surgery.load_model(out / "merged"), tokenizer, held_out)
    left = report.receipt["survived"]
    print(f"trained on {out.name}: {before}")
    print(f"  merged into nf4: {after}; of its change retained {left['retained']:.2f}, noise {left['noise']:.2f}")
    return before, after


def train(model: nn.Module, tokenizer: Any, epochs: int, learning_rate: float) -> nn.Module:
    """InfoNCE with the other answers of a batch as negatives."""
    given: Pairs = pairs("pairs_train.jsonl")[:PAIRS]
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=learning_rate)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(given)).split(BATCH):
            batch = [given[index] for index in chosen.tolist()]
            queries = embed(model, tokenizer, [query for query, _ in batch])
            answers = embed(model, tokenizer, [answer for _, answer in batch])
            loss = F.cross_entropy(queries @ answers.T / TEMPERATURE, torch.arange(len(batch)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model


if __name__ == "__main__":
    main()
