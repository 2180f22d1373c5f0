"""The library in thirty lines: two adapters on a tiny Llama, merged, unmerged and taken out without a trace."""

import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import surgery


def main() -> None:
    torch.manual_seed(0)
    sizes = LlamaConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, vocab_size=256
    )
    model = LlamaForCausalLM(sizes).eval()
    tokens = torch.arange(16)[None]  # [batch, seq]
    before = model(tokens).logits

    config = surgery.LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
    model = surgery.inject(model, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()

    with tempfile.TemporaryDirectory() as folder:
        surgery.save(model, folder)  # PEFT files, which peft itself loads
        surgery.load(model, folder, adapter_name="b")
    surgery.set_adapter(model, "b")
    with surgery.disable_adapters(model):
        assert torch.equal(model(tokens).logits, before)
    assert not torch.equal(model(tokens).logits, before)

    surgery.merge(model)
    surgery.unmerge(model)
    surgery.eject(model)
    assert torch.equal(model(tokens).logits, before)
    print("the model is what it was, bit for bit")


if __name__ == "__main__":
    main()
