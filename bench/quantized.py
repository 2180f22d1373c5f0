"""Merge LoRA into the nf4 form of the checkpoint of bench.merge, to bf16, beside the merge of the plain one and peft's.

Each figure is of a whole process, imports included, with what it wrote on the disk at its end.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from bench.merge import LAYERS, LINEARS, make_adapter, make_base, peak_mb, surgery
from bench.words import times

ROUNDS = 3
KINDS = ("plain", "quantized", "peft")


def main() -> None:
    if len(sys.argv) > 1:
        alone(sys.argv[1], Path(sys.argv[2]))
        return
    with tempfile.TemporaryDirectory() as name:
        measured("make", Path(name))
        runs = [{kind: measured(kind, Path(name)) for kind in KINDS} for _ in range(ROUNDS)]
    took = {kind: median(one[kind][0] for one in runs) for kind in KINDS}
    peak = {kind: max(one[kind][1] for one in runs) for kind in KINDS}
    told = {kind: f"{took[kind]:.1f} s, peak RSS {peak[kind]:.0f} MB" for kind in KINDS}
    ratio = f"{took['quantized'] / took['plain']:.2f} of the plain merge"
    rows = [
        ["merge the 1.1B base in nf4 to bf16", told["quantized"], told["peft"], ratio, "<= 3; <= 700 MB"],
        ["the same against peft", "", "", times(took["peft"] / took["quantized"]), ">= 4 x"],
    ]
    print(json.dumps(rows))


def measured(kind: str, folder: Path) -> tuple[float, float]:
    """Seconds and peak megabytes of one run in a process of its own."""
    os.sync()
    start = time.perf_counter()
    command = [sys.executable, "-m", "bench.quantized", kind, str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    spent = time.perf_counter() - start
    shutil.rmtree(folder / kind, ignore_errors=True)
    return spent, float(done.stdout.splitlines()[-1])


def alone(kind: str, folder: Path) -> None:
    """One run; prints its peak RSS in MB."""
    if kind == "make":
        make_base(folder / "base", LAYERS)
        make_adapter(folder / "adapter", LAYERS)
        quantize(folder / "base", folder / "nf4")
    elif kind == "peft":
        merge_peft(folder)
    else:
        surgery("merge", folder / {"plain": "base", "quantized": "nf4"}[kind], folder / "adapter", folder / kind)
    print(peak_mb())


def quantize(base: Path, out: Path) -> None:
    """The linear weights of each shard in nf4, doubly quantized, as transformers writes them."""
    from safetensors.torch import load_file, save_file

    from surgery.codecs import FORMS

    codec, settings = FORMS["nf4-double"]
    out.mkdir()
    index = {}
    for path in sorted(base.glob("*.safetensors")):
        part = {}
        for name, weight in load_file(path).items():
            if name.removesuffix(".weight").rpartition("layers.")[2].partition(".")[2] in LINEARS:
                held = codec.fresh(weight, settings).tensors
                part |= {name.removesuffix("weight") + role: one for role, one in held.items()}
            else:
                part[name] = weight
        save_file(part, out / path.name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, path.name)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    told = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    told |= {"bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": "bfloat16"}
    config = json.loads((base / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"quantization_config": told}))


def merge_peft(folder: Path) -> None:
    """Into 4 bits, which is all that peft does there; then plain weights, which is all that transformers then saves."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "nf4", dtype=torch.bfloat16)
    merged = peft.PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload()
    merged.dequantize().save_pretrained(folder / "peft", save_original_format=False)
    os.sync()


if __name__ == "__main__":
    main()
