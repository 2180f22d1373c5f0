"""Writes docs/onnx.md: `python tests/peers/onnx_table.py`.

Every architecture under LoRA over all its linears, exported merged, swappable and with a cache, each proved.
"""

import sys
import tempfile
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from architectures import ARCHITECTURES

import surgery

PAGE = Path(__file__).parents[2] / "docs" / "onnx.md"
WAYS: Mapping[str, Mapping[str, Any]] = {"merged": {}, "swappable": {"swappable": True}, "merged, `--kv`": {"kv": True}}
COLUMNS = ("architecture", *WAYS, "weights", "graph")
_PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "onnxscript", "onnx-ir")


def row(name: str) -> list[str]:
    """The cells of one architecture."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().eval()
    surgery.inject(model, surgery.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    cells, first = [], None
    for options in WAYS.values():
        with tempfile.TemporaryDirectory() as scratch:
            try:
                report = surgery.export_onnx(model, None, Path(scratch, "out"), **options)
            except surgery.SurgeryError as error:
                cells.append("" if "no decoder of text" in str(error) else f"refused: {error}")
                continue
        first = first or report
        runs = [one for trial in report.proof.trials for one in trial.compared[-1].outputs]
        cells.append(f"{max(one.found.error for one in runs):.1e}")
    assert first is not None, cells
    return [name, *cells, f"{sum(first.weights.values()):,}", f"{first.graph_bytes:,}"]


def page(rows: list[list[str]]) -> str:
    """The whole page."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return f"""# ONNX: what is covered, and how near

Tiny models with random weights, in float32, under LoRA over all their linear layers. A cell is the largest error of
what onnxruntime gives against the adapted model in float64, over all runs, relative to the largest output; a run is
allowed 8 times the noise of float32. `--kv` is for decoders alone, and compares greedy tokens too. Sizes are in bytes,
of the merged export: its weights are those of the safetensors, and of `model.onnx.data` where experts are fused.

{table}

Written by `python tests/peers/onnx_table.py`, with {versions}.
"""


if __name__ == "__main__":
    found = []
    for name in ARCHITECTURES:
        found.append(row(name))
        print(*found[-1], file=sys.stderr, flush=True)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(page(found))
