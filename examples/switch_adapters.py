"""Two LoRA adapters of one model, each trained by a plain loop, then switched at run time, and both in one batch."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import surgery

SEQUENCES = {"up": torch.arange(16)[None], "down": torch.arange(15, -1, -1)[None]}  # [batch, seq]
STEPS, KNOWN = 60, 4


def main() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model: Any = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=16, pad_token_id=0))
    config = surgery.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", modules_to_save=["lm_head"])
    for name, tokens in SEQUENCES.items():
        surgery.inject(model, config, adapter_name=name)
        train(model, name, tokens)
    model.eval()

    alone = {}
    for name, tokens in SEQUENCES.items():
        model.set_adapter(name)
        alone[name] = continued(model, tokens[:, :KNOWN])
    with model.disable_adapters():
        assert not torch.equal(continued(model, SEQUENCES["up"][:, :KNOWN]), alone["up"])

    prompts = torch.cat([tokens[:, :KNOWN] for tokens in SEQUENCES.values()])
    together = continued(model, prompts, adapter_names=list(SEQUENCES))  # an adapter for each row
    assert torch.equal(together, torch.cat(list(alone.values())))
    right = sum(torch.equal(alone[name], tokens) for name, tokens in SEQUENCES.items())
    print(f"{right} of {len(SEQUENCES)} adapters go on as they were taught, alone and in one batch")


def train(model: Any, name: str, tokens: Tensor) -> None:
    """A loop as for any model: only the adapter that is set has gradients."""
    model.set_adapter(name)
    model.train()
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    for _ in range(STEPS):
        model(tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def continued(model: Any, prompt: Tensor, **options: Any) -> Tensor:
    """[batch, seq]"""
    found: Tensor = model.generate(prompt, max_length=16, do_sample=False, eos_token_id=None, **options)
    return found


if __name__ == "__main__":
    main()
