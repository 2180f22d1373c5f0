"""Export a decoder of 16 layers and 222M parameters under LoRA to ONNX, merged and verified, against torch.onnx.export.

torch's side exports and saves the merged model, and compares nothing. Both take turns in one process, so that a busy
machine slows each alike.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import surgery
from bench.thin import TARGETS, middle, seconds, shuffle_adapters

LAYERS, ROUNDS = 16, 3
WANTED_S = 90


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps([measured(Path(folder))]))


def measured(scratch: Path) -> list[str]:
    once(decoder(1), scratch)  # what either side imports and registers is no part of it
    took = [once(decoder(LAYERS), scratch) for _ in range(ROUNDS)]
    ours, theirs = (middle(list(side)) for side in zip(*took, strict=True))
    what = f"export a decoder of {LAYERS} layers to ONNX and verify it, against torch.onnx.export and save"
    return [what, f"{ours:.1f} s", f"{theirs:.1f} s", f"{ours / theirs:.2f}", f"<= 1; <= {WANTED_S} s"]


def once(model: Any, scratch: Path) -> tuple[float, float]:
    """Seconds of either side."""
    ours = seconds(lambda: surgery.export_onnx(model, None, scratch / "surgery"))
    merged = surgery.eject(surgery.merge(model), keep_merged=True)
    theirs = seconds(lambda: by_torch(merged, scratch / "torch"))
    for folder in scratch.iterdir():
        shutil.rmtree(folder)
    return ours, theirs


def by_torch(model: Any, out: Path) -> None:
    inputs = {"input_ids": torch.ones(2, 6, dtype=torch.int64), "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    any_size = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    program: Any = torch.onnx.export(
        model, kwargs=inputs, dynamo=True, verbose=False, dynamic_shapes=dict.fromkeys(inputs, any_size)
    )
    out.mkdir()
    program.save(out / "model.onnx", external_data=True)


def decoder(layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=layers,
        num_attention_heads=16,
        vocab_size=16000,
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = surgery.inject(LlamaForCausalLM(config).eval(), surgery.LoraConfig(r=16, target_modules=TARGETS))
    shuffle_adapters(model)
    return model


if __name__ == "__main__":
    main()
