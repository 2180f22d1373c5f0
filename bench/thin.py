"""The thin Llama that the overhead of adapters is measured on: many layers, little arithmetic."""

import time
from collections.abc import Callable
from statistics import median

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

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
    return LlamaForCausalLM(config).eval()


def shuffle_adapters(model: nn.Module) -> None:
    """Random B, so that an adapter has something to do."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)


def seconds(once: Callable[[], object]) -> float:
    start = time.perf_counter()
    once()
    return time.perf_counter() - start


def middle(values: list[float]) -> float:
    return median(values)
