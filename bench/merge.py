"""Merge LoRA (r = 16, all linears) into a made 1.1B bf16 checkpoint of three shards, against peft and mergekit.

Each figure is of a whole process, imports included, with what it wrote on the disk at its end.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from bench.words import times


def linears(hidden: int, intermediate: int, kv: int) -> dict[str, tuple[int, int]]:
    """Shapes of a Llama layer's, by name; `kv` is the width of keys and values."""
    return {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden),
        "self_attn.v_proj": (kv, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }


HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCAB, RANK, SHARDS = 2048, 5632, 22, 32, 4, 32000, 16, 3
KV = HIDDEN // HEADS * KV_HEADS
LINEARS = linears(HIDDEN, INTERMEDIATE, KV)
ROUNDS = 3
START_S = 3  # what no copy does: Python and torch are started, and the last file is waited for
COMMANDS = {
    "merge": ("merge", "base", "adapter", "merge"),
    "twice": ("merge", "base2", "adapter2", "twice"),
    "reversible": ("merge", "base", "adapter", "reversible", "--reversible"),
    "verify": ("verify", "base", "adapter", "reversible"),
    "unmerge": ("unmerge", "reversible", "unmerge"),
}
MERGED = LAYERS * sum(rows * columns for rows, columns in LINEARS.values())


def main() -> None:
    if len(sys.argv) > 1:
        alone(sys.argv[1], Path(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run([sys.executable, "-m", "bench.merge", "make", name], check=True)
        kinds = ("copy", *COMMANDS, "peft", "mergekit")
        found = {kind: [measured(kind, folder) for _ in range(ROUNDS)] for kind in kinds}
        added, size = undo_bytes(folder), sum(path.stat().st_size for path in (folder / "base").iterdir())
    took = {kind: median(one[0] for one in runs) for kind, runs in found.items()}
    peak = {kind: max(one[1] for one in runs) for kind, runs in found.items()}
    print(json.dumps(table(took, peak, added, size)))


def table(took: dict[str, float], peak: dict[str, float], added: int, size: int) -> list[list[str]]:
    """The rows, whose ratios are of medians."""

    def both(kind: str) -> str:
        return f"{took[kind]:.1f} s, peak RSS {peak[kind]:.0f} MB"

    copied, merged = took["copy"], took["merge"]
    return [
        ["cp and sync of a 1.1B bf16 base", f"{copied:.1f} s", "", "", ""],
        ["merge it, streaming", both("merge"), both("peft"), times(took["peft"] / merged), ">= 4 x; <= 600 MB"],
        ["the same against mergekit", "", both("mergekit"), times(took["mergekit"] / merged), ">= 4 x"],
        [
            f"the same over cp and sync, but for {START_S} s: starting Python and torch, and the last fsync",
            f"{merged:.1f} s",
            "",
            f"{(merged - START_S) / copied:.2f} x {copied:.1f} s + {START_S} s",
            f"<= 2.0 x (cp + sync) + {START_S} s",
        ],
        [
            "merge a base twice as large",
            both("twice"),
            "",
            f"{peak['twice'] / peak['merge']:.2f} of the memory",
            "<= 1.1",
        ],
        ["merge, reversible", both("reversible"), "", f"{took['reversible'] / merged - 1:+.0%} of time", "<= +50%"],
        [
            "its undo record, adapter aside",
            f"{8 * added / MERGED:.3f} bits a parameter",
            "",
            f"{added / size:.2%}",
            "<= 0.3%",
        ],
        ["verify it", both("verify"), "", f"{took['verify'] / merged:.2f} of merge", "<= 1.5"],
        ["unmerge it", both("unmerge"), "", f"{took['unmerge'] / merged:.2f} of merge", "<= 2"],
    ]


def undo_bytes(folder: Path) -> int:
    """What a reversible merge writes besides, but for its copy of the adapter."""
    record = (folder / "reversible" / "surgery.undo").rglob("*")
    return sum(path.stat().st_size for path in record if path.is_file() and not path.name.startswith("adapter-"))


def measured(kind: str, folder: Path) -> tuple[float, float]:
    """Seconds of one run in a process of its own, from its start to its end, and its peak resident megabytes.

    All that was written before is on the disk when it starts; what it writes itself is waited for.
    """
    shutil.rmtree(folder / kind, ignore_errors=True)
    os.sync()
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "bench.merge", kind, str(folder)], check=True, capture_output=True, text=True
    )
    spent = time.perf_counter() - start
    if kind in ("merge", "twice", "unmerge", "peft", "mergekit"):
        shutil.rmtree(folder / kind)
    taken, peak = json.loads(done.stdout.splitlines()[-1])
    return taken if kind == "copy" else spent, peak


def alone(kind: str, folder: Path) -> None:
    """One run; prints its seconds and its peak RSS in MB."""
    runs = {"copy": copy_base, "peft": merge_peft, "mergekit": merge_mergekit, "make": make_all}
    start = time.perf_counter()
    if kind in COMMANDS:
        command, *rest = COMMANDS[kind]
        surgery(command, *(folder / one if not one.startswith("-") else one for one in rest))
    else:
        runs[kind](folder)
    print(json.dumps([time.perf_counter() - start, peak_mb()]))


def peak_mb() -> float:
    """Peak resident memory of this process. ru_maxrss would count the parent's, from before exec."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1e3


def surgery(*arguments: object) -> None:
    """The command line, as a program of its own runs it."""
    from surgery.cli import main

    sys.argv = ["surgery", *map(str, arguments)]
    try:
        main()
    except SystemExit as ended:
        if ended.code:
            raise


def copy_base(folder: Path) -> None:
    subprocess.run(["cp", "-r", folder / "base", folder / "copy"], check=True)
    os.sync()


def merge_peft(folder: Path) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    merged = peft.PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    merged.save_pretrained(folder / "peft")
    os.sync()


def merge_mergekit(folder: Path) -> None:
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    model = f"{folder / 'base'}+{folder / 'adapter'}"
    config = {"merge_method": "passthrough", "dtype": "bfloat16", "models": [{"model": model}]}
    options = MergeOptions(write_model_card=False, copy_tokenizer=False, lora_merge_cache=str(folder / "cache"))
    run_merge(MergeConfiguration.model_validate(config), str(folder / "mergekit"), options)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    os.sync()


def make_all(folder: Path) -> None:
    make_base(folder / "base", LAYERS)
    make_base(folder / "base2", 2 * LAYERS)
    make_adapter(folder / "adapter", LAYERS)
    make_adapter(folder / "adapter2", 2 * LAYERS)


def weights(layers: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield "model.embed_tokens.weight", (VOCAB, HIDDEN)
    for layer in range(layers):
        for name, shape in LINEARS.items():
            yield f"model.layers.{layer}.{name}.weight", shape
        yield f"model.layers.{layer}.input_layernorm.weight", (HIDDEN,)
        yield f"model.layers.{layer}.post_attention_layernorm.weight", (HIDDEN,)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCAB, HIDDEN)


def make_base(folder: Path, layers: int) -> None:
    """Seeded normal weights, std 0.02, in three shards with an index and a config."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        num_hidden_layers=layers,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        vocab_size=VOCAB,
        tie_word_embeddings=False,
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    config.save_pretrained(folder)
    every = list(weights(layers))
    size, index = -(-len(every) // SHARDS), {}
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        part = {key: (0.02 * torch.randn(shape)).bfloat16() for key, shape in every[shard * size : (shard + 1) * size]}
        save_file(part, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    total = sum(2 * torch.Size(shape).numel() for _, shape in every)
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)


def make_adapter(folder: Path, layers: int) -> None:
    """PEFT's files for LoRA on all linears."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(1)
    tensors = {}
    for layer in range(layers):
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
