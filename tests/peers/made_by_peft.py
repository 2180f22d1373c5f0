"""Models and adapters of peft's for the tests of its defects."""

import copy
from pathlib import Path

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

TINY = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 29}
FILE, ADAPTER, CONFIG = "model.safetensors", "adapter_model.safetensors", "adapter_config.json"
each_half = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def llama(dtype: torch.dtype = torch.float32, **more: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY | more)).to(dtype).eval()


def lora(**fields: object) -> peft.LoraConfig:
    return peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "target_modules": ["q_proj"], "init_lora_weights": False} | fields
    )


def adapted(model: nn.Module, config: peft.PeftConfig, **more: object) -> peft.PeftModel:
    torch.manual_seed(1)
    return peft.get_peft_model(copy.deepcopy(model), config, **more)


def outputs(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(9)[None])[0].clone()


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


def saved(folder: Path, config: peft.PeftConfig, model: nn.Module | None = None) -> Path:
    adapted(model or net(), config).save_pretrained(folder)
    return folder
