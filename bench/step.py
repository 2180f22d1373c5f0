"""A training step of a decoder of 110M parameters with LoRA (r = 16) on all linears, 4 x 256 tokens, against peft.

All take turns in one process, so that a busy machine slows each alike; then each runs alone, for its memory.
Where there is a GPU, it runs there.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.merge import peak_mb
from bench.thin import TARGETS, middle, seconds, shuffle_adapters

BATCH, SEQ, RANK, VOCAB = 4, 256, 16, 32000
FIELDS = {"r": RANK, "lora_alpha": 32, "target_modules": TARGETS}
ROUNDS, ALONE = 7, 3
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Step = Callable[[], None]


def main() -> None:
    if len(sys.argv) > 1:
        alone(sys.argv[1])
        return
    steps = {kind: make() for kind, make in MAKERS.items()}
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for step in steps.values():
        step()
    for _ in range(ROUNDS):
        for kind, step in steps.items():
            times[kind].append(seconds(step))
    steps.clear()
    print(json.dumps(table({kind: middle(values) for kind, values in times.items()})))


def table(took: Mapping[str, float]) -> list[list[str]]:
    ours, theirs, bare = took["surgery"], took["peft"], took["bare"]
    memory = {kind: measured(kind) for kind in ("surgery", "peft")}
    what = f"training step of a 110M decoder, LoRA; its base alone takes {1e3 * bare:.0f} ms"
    row = [what, f"{1e3 * ours:.0f} ms", f"{1e3 * theirs:.0f} ms", f"{ours / theirs:.2f}", "<= 0.9"]
    over = [f"{kind / bare:.2f} x" for kind in (ours, theirs)]
    used = [f"{memory[kind]:.0f} MB" for kind in ("surgery", "peft")]
    return [
        row,
        ["the same over forward and backward of its base", *over, "", "<= 1.15 x"],
        ["peak memory of it", *used, f"{memory['surgery'] / memory['peft']:.2f}", "<= 1"],
    ]


def measured(kind: str) -> float:
    """Peak megabytes of a process that trains by one of the two."""
    command = [sys.executable, "-m", "bench.step", kind]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def alone(kind: str) -> None:
    step = MAKERS[kind]()
    for _ in range(ALONE):
        step()
    print(torch.cuda.max_memory_allocated() / 1e6 if DEVICE == "cuda" else peak_mb())


def bare() -> Step:
    """Forward and backward of the frozen base, by way of its embeddings' gradients."""
    model = decoder().requires_grad_(False)
    model.enable_input_require_grads()
    return lambda: backward(model)


def surgery() -> Step:
    import surgery as ours

    return trained(ours.inject(decoder(), ours.LoraConfig(**FIELDS)))


def peft() -> Step:
    import peft as theirs

    return trained(theirs.get_peft_model(decoder(), theirs.LoraConfig(**FIELDS)))


MAKERS: Mapping[str, Callable[[], Step]] = {"bare": bare, "surgery": surgery, "peft": peft}


def decoder() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        vocab_size=VOCAB,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(DEVICE).train()


def trained(model: Any) -> Step:
    shuffle_adapters(model)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-4)

    def step() -> None:
        backward(model)
        optimizer.step()
        optimizer.zero_grad()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    return step


def backward(model: Any) -> None:
    tokens = torch.arange(BATCH * SEQ, device=DEVICE).view(BATCH, SEQ)
    model(input_ids=tokens, labels=tokens).loss.backward()


if __name__ == "__main__":
    main()
