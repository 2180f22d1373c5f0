"""The thin Llama that the overhead of adapters is measured on: many layers, little arithmetic. And how it is timed."""

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

# `python -m bench.NAME` runs on a GPU where there is one; `make bench` has it on the CPU, `python -m bench.gpu` there.
DEVICE = os.environ.get("BENCH_DEVICE") or ("cuda" if torch.cuda.is_available() else "cpu")
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def thin_llama(layers: int = 200) -> LlamaForCausalLM:
    """Hidden 64, intermediate 128, 4 heads: 7 targets a layer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=4,
        vocab_size=128,
        tie_word_embeddings=False,
    )
    with torch.device(DEVICE):
        return LlamaForCausalLM(config).eval()


def shuffle_adapters(model: nn.Module) -> None:
    """Random B, so that an adapter has something to do."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)


def seconds(once: Callable[[], object]) -> float:
    """How long it takes until its outcome is there."""
    finish()
    start = time.perf_counter()
    once()
    finish()
    return time.perf_counter() - start


def in_turn(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, round by round, in another order each: a busy machine, and full caches, slow each alike."""
    chance = random.Random(0)
    took: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for _ in range(rounds):
        chance.shuffle(order)
        for name in order:
            took[name].append(seconds(runs[name]))
    return took


def finish() -> None:
    """Wait for what runs on a GPU."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def middle(values: Sequence[float]) -> float:
    return median(values)


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The middle of what one takes over the other in the same round: the machine's speed changes between rounds."""
    return median(one / other for one, other in zip(ours, theirs, strict=True))
