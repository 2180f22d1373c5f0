"""Export the shape of an 8B Llama in float32, 32 GB of weights, to ONNX: what it takes in time and memory.

Its file is sparse, all zeros, so that nothing can be told of its outputs, and it is not run. The merged copy is 32 GB.
"""

import json
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.merge import linears, peak_mb, surgery

HIDDEN, INTERMEDIATE, LAYERS, HEADS, KV_HEADS, VOCAB = 4096, 14336, 32, 32, 8, 128256
KV = HIDDEN // HEADS * KV_HEADS
LAYER = {
    **linears(HIDDEN, INTERMEDIATE, KV),
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
}
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "vocab_size": VOCAB,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
WANTED = "<= 1500 MB"


def main() -> None:
    if len(sys.argv) > 1:
        alone(Path(sys.argv[1]))
        return
    with tempfile.TemporaryDirectory() as name:
        size = make_base(Path(name) / "base")
        what = f"export of {size / 1e9:.0f} GB of float32 weights to ONNX"
        if shutil.disk_usage(name).free < 1.1 * size:
            print(json.dumps([[what, "no room on the disk", "", "", WANTED]]))
            return
        done = subprocess.run([sys.executable, "-m", "bench.export", name], check=True, capture_output=True, text=True)
        spent, peak = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps([[what, f"{spent:.0f} s, peak RSS {peak:.0f} MB", "", "", WANTED]]))


def alone(folder: Path) -> None:
    """One export; prints its seconds and its peak RSS in MB."""
    start = time.perf_counter()
    surgery("export", folder / "base", folder / "out", "--max-memory", "1MB")
    print(json.dumps([time.perf_counter() - start, peak_mb()]))


def make_base(folder: Path) -> int:
    """A checkpoint that takes no room; returns the bytes of its weights."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    header, at = {}, 0
    for name, shape in shapes().items():
        size = 4
        for extent in shape:
            size *= extent
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + at)
    return at


def shapes() -> dict[str, tuple[int, ...]]:
    """Of all tensors, by name."""
    ends: dict[str, tuple[int, ...]] = {"model.norm.weight": (HIDDEN,)}
    ends |= {"model.embed_tokens.weight": (VOCAB, HIDDEN), "lm_head.weight": (VOCAB, HIDDEN)}
    names = ((f"model.layers.{i}.{part}.weight", shape) for i in range(LAYERS) for part, shape in LAYER.items())
    return ends | dict(names)


if __name__ == "__main__":
    main()
