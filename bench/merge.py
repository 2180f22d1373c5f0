"""Merge LoRA (r = 16, all linears) into a made 1.1B bf16 checkpoint of three shards, streaming, against peft."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.words import times

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCAB, RANK, SHARDS = 2048, 5632, 22, 32, 4, 32000, 16, 3
KV = HIDDEN // HEADS * KV_HEADS
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KV, HIDDEN),
    "self_attn.v_proj": (KV, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}


def main() -> None:
    if len(sys.argv) > 1:
        alone(sys.argv[1], Path(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_base(folder / "base")
        make_adapter(folder / "adapter")
        found = {
            kind: measured(kind, folder) for kind in ("copy", "surgery", "reversible", "verify", "unmerge", "peft")
        }
    theirs, peft_mb, _ = found["peft"]
    names = {
        "surgery": "merge 1.1B bf16, streaming",
        "reversible": "the same, reversible",
        "verify": "verify it",
        "unmerge": "unmerge it",
    }
    rows = [
        ["cp and sync of the base", f"{found['copy'][0]:.1f} s", "", "", ""],
        *([what, *figures(*found[kind][:2])] for kind, what in names.items()),
        ["undo record of it", f"{found['reversible'][2]:.3f} bits a parameter", "", "", ""],
    ]
    rows[1][2:] = [f"{theirs:.1f} s, peak RSS {peft_mb:.0f} MB", times(theirs / found["surgery"][0]), "<= 600 MB"]
    print(json.dumps(rows))


def figures(taken: float, mb: float) -> list[str]:
    return [f"{taken:.1f} s, peak RSS {mb:.0f} MB", "", "", "<= 600 MB"]


def measured(kind: str, folder: Path) -> tuple[float, ...]:
    """Seconds and peak resident megabytes of one run in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "bench.merge", kind, str(folder)], check=True, capture_output=True, text=True
    )
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def alone(kind: str, folder: Path) -> None:
    """One run; prints seconds, peak RSS in MB, and undo bits a parameter."""
    taken = {
        "copy": copy_base,
        "surgery": merge,
        "reversible": merge_reversible,
        "verify": verify,
        "unmerge": unmerge,
        "peft": merge_peft,
    }
    spent = taken[kind](folder)
    peak = peak_mb()
    undo = (folder / "reversible" / "surgery.undo").glob("streams-*")
    merged = LAYERS * sum(rows * columns for rows, columns in LINEARS.values())
    bits = 8 * sum(path.stat().st_size for path in undo) / merged if kind == "reversible" else 0.0
    if kind in ("copy", "surgery", "unmerge", "peft"):
        shutil.rmtree(folder / kind)
    print(json.dumps([spent, peak, bits]))


def peak_mb() -> float:
    """Peak resident memory of this process. ru_maxrss would count the parent's, from before exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3


def copy_base(folder: Path) -> float:
    start = time.perf_counter()
    shutil.copytree(folder / "base", folder / "copy")
    os.sync()
    return time.perf_counter() - start


def merge(folder: Path, out: str = "surgery", *options: str) -> float:
    return command("merge", folder / "base", folder / "adapter", folder / out, *options)


def merge_reversible(folder: Path) -> float:
    return merge(folder, "reversible", "--reversible")


def verify(folder: Path) -> float:
    return command("verify", folder / "base", folder / "adapter", folder / "reversible")


def unmerge(folder: Path) -> float:
    return command("unmerge", folder / "reversible", folder / "unmerge")


def command(*arguments: object) -> float:
    """Seconds of a call of the command line, within this process."""
    from surgery.cli import surgery

    start = time.perf_counter()
    surgery.main([str(one) for one in arguments], standalone_mode=False)
    return time.perf_counter() - start


def merge_peft(folder: Path) -> float:
    import peft
    from transformers import AutoModelForCausalLM

    start = time.perf_counter()
    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    merged = peft.PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    merged.save_pretrained(folder / "peft")
    return time.perf_counter() - start


def weights() -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        for name, shape in LINEARS.items():
            yield f"model.layers.{layer}.{name}.weight", shape
        yield f"model.layers.{layer}.input_layernorm.weight", (HIDDEN,)
        yield f"model.layers.{layer}.post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


def make_base(folder: Path) -> None:
    """Seeded normal weights, std 0.02, in three shards with an index and a config."""
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCAB,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    every = list(weights())
    size, index = -(-len(every) // SHARDS), {}
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        part = {key: (0.02 * torch.randn(shape)).bfloat16() for key, shape in every[shard * size : (shard + 1) * size]}
        save_file(part, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    total = sum(2 * torch.Size(shape).numel() for _, shape in every)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def make_adapter(folder: Path) -> None:
    """PEFT's files for LoRA on all linears."""
    from safetensors.torch import save_file

    torch.manual_seed(1)
    tensors = {}
    for layer in range(LAYERS):
        for name, (rows, columns) in LINEARS.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, columns) / columns**0.5
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(rows, RANK) * 0.002
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = [name.rpartition(".")[2] for name in LINEARS]
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 32, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(config))


if __name__ == "__main__":
    main()
