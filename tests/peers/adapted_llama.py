"""A tiny Llama under two adapters, and what tests ask of it."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import surgery

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 99}


TOKENS = torch.arange(24).reshape(2, 12)


FIRST = {"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False}


SECOND = {"r": 2, "target_modules": ["up_proj", "v_proj"], "init_lora_weights": False}


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, **options)).eval()


def adapted(**options: Any) -> LlamaForCausalLM:
    """Under a first adapter, which is active, and a second one."""
    model = surgery.inject(llama(**options), surgery.LoraConfig(**FIRST), adapter_name="first")
    model.add_adapter(surgery.LoraConfig(**SECOND), "second")
    model.set_adapter("first")
    return model


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def trained(model: nn.Module) -> set[str]:
    return {name for name, values in model.named_parameters() if values.requires_grad}


def unchanged(model: nn.Module, before: dict[str, Tensor]) -> bool:
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(values, before[name]) for name, values in now.items())


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: values.clone() for name, values in model.state_dict().items()}
