"""A training step of a decoder with LoRA (r = 16) on all linears, against peft: `python -m bench.step [110M | 1.1B]`.

All take turns in one process; then each runs alone, for its memory.
"""

import gc
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bench.merge import peak_mb
from bench.thin import DEVICE, TARGETS, finish, in_turn, middle, ratio, shuffle_adapters
from bench.words import ms

RANK, VOCAB = 16, 32000
FIELDS = {"r": RANK, "lora_alpha": 32, "target_modules": TARGETS}
ROUNDS, ALONE = 20 if DEVICE == "cuda" else 15, 3
Step = Callable[[], None]


class Size(NamedTuple):
    """A decoder, and what it is trained on."""

    hidden: int
    inner: int
    layers: int
    heads: int
    key_heads: int
    batch: int
    seq: int
    dtype: torch.dtype = torch.float32
    tied: bool = True


SIZES: Mapping[str, Size] = {
    "110M": Size(768, 2048, 12, 12, 12, batch=4, seq=256),
    "1.1B": Size(2048, 5632, 22, 32, 4, batch=4, seq=1024, dtype=torch.bfloat16, tied=False),
}


def main(name: str = "110M", alone: str = "") -> None:
    if alone:
        print(peak_of(name, alone))
        return
    print(json.dumps(table(name, times(name))))


def times(name: str) -> Mapping[str, list[float]]:
    """Seconds of a step by each, round by round."""
    steps = {kind: make(name) for kind, make in MAKERS.items()}
    for step in steps.values():
        step()
    return in_turn(steps, ROUNDS)


def table(name: str, took: Mapping[str, list[float]]) -> list[list[str]]:
    ours, theirs, bare = took["surgery"], took["peft"], took["bare"]
    memory = {kind: measured(name, kind) for kind in ("surgery", "peft")}
    what = f"training step of a {name} decoder, LoRA; its base alone takes {ms(middle(bare))}"
    row = [what, ms(middle(ours)), ms(middle(theirs)), f"{ratio(ours, theirs):.2f}", "<= 0.9"]
    over = [f"{ratio(one, bare):.2f} x" for one in (ours, theirs)]
    used = [f"{memory[kind]:.0f} MB" for kind in ("surgery", "peft")]
    return [
        row,
        ["the same over forward and backward of its base", *over, "", "<= 1.15 x"],
        ["peak memory of it", *used, f"{memory['surgery'] / memory['peft']:.2f}", "<= 1"],
    ]


def measured(name: str, kind: str) -> float:
    """Peak megabytes of training by one of the two: of a GPU's memory, or of a process."""
    if DEVICE == "cuda":
        return peak_of(name, kind)
    command = [sys.executable, "-m", "bench.step", name, kind]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.splitlines()[-1])


def peak_of(name: str, kind: str) -> float:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.reset_peak_memory_stats()
    step = MAKERS[kind](name)
    for _ in range(ALONE):
        step()
    return torch.cuda.max_memory_allocated() / 1e6 if DEVICE == "cuda" else peak_mb()


def bare(name: str) -> Step:
    """Forward and backward of the frozen base, by way of its embeddings' gradients."""
    model = decoder(name).requires_grad_(False)
    model.enable_input_require_grads()
    return lambda: backward(model, SIZES[name])


def surgery(name: str) -> Step:
    import surgery as ours

    return trained(ours.inject(decoder(name), ours.LoraConfig(**FIELDS)), SIZES[name])


def peft(name: str) -> Step:
    import peft as theirs

    return trained(theirs.get_peft_model(decoder(name), theirs.LoraConfig(**FIELDS)), SIZES[name])


MAKERS: Mapping[str, Callable[[str], Step]] = {"bare": bare, "surgery": surgery, "peft": peft}


def decoder(name: str) -> LlamaForCausalLM:
    torch.manual_seed(0)
    size = SIZES[name]
    config = LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_heads,
        vocab_size=VOCAB,
        tie_word_embeddings=size.tied,
    )
    with torch.device(DEVICE):
        return LlamaForCausalLM(config).to(size.dtype).train()


def trained(model: Any, size: Size) -> Step:
    shuffle_adapters(model)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-4)

    def step() -> None:
        backward(model, size)
        optimizer.step()
        optimizer.zero_grad()
        finish()

    return step


def backward(model: Any, size: Size) -> None:
    tokens = torch.arange(size.batch * size.seq, device=DEVICE).view(size.batch, size.seq)
    model(input_ids=tokens, labels=tokens).loss.backward()


if __name__ == "__main__":
    main(*sys.argv[1:])
