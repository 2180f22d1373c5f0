"""From training to a merged checkpoint: verified tensor by tensor and by its outputs, then loaded by transformers."""

import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import surgery

TOKENS = torch.arange(64).view(4, 16)  # [batch, seq]
STEPS = 20


def main() -> None:
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        base = made_base(folder / "base")
        model: Any = AutoModelForCausalLM.from_pretrained(base)
        surgery.inject(model, surgery.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"]))
        train(model)
        surgery.save(model, folder / "adapter")

        surgery.merge_checkpoint(base, folder / "adapter", folder / "merged")  # a tile at a time, whatever its size
        report = surgery.verify_checkpoint(base, folder / "adapter", folder / "merged", outputs=True)
        report.require()

        plain, told = AutoModelForCausalLM.from_pretrained(folder / "merged", output_loading_info=True)
        assert not told["missing_keys"]
        assert not told["unexpected_keys"]
        with torch.no_grad():
            assert torch.equal(plain(TOKENS).logits, surgery.merge(model.eval())(TOKENS).logits)
    print("transformers alone gives what the merged model gives, to the bit")


def made_base(folder: Path) -> Path:
    """Where the model that is to be trained lies."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64)).save_pretrained(folder)
    return folder


def train(model: Any) -> None:
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    for _ in range(STEPS):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    main()
