"""runtime: a graph run by onnxruntime, in a process of its own, which gives all its memory back."""

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from surgery.errors import CheckError, printable

CHILD = Path(__file__).with_name("child.py")
Feeds = Mapping[str, Tensor]


def run(graph: Path, trials: Sequence[Feeds]) -> list[dict[str, Tensor]]:
    """The outputs of each trial by name. CheckError if onnxruntime cannot open or run the graph."""
    told = _run(graph, {f"{i}/{name}": values for i, feeds in enumerate(trials) for name, values in feeds.items()})
    found: list[dict[str, Tensor]] = [{} for _ in trials]
    for key, values in told.items():
        trial, _, name = key.partition("/")
        found[int(trial)][name] = values
    return found


def decode(graph: Path, prompt: Tensor, steps: int) -> Tensor:
    """The tokens that a decoder with a cache finds to be the most probable after `prompt` [1, length]; [steps]."""
    return _run(graph, {"decode/prompt": prompt, "decode/steps": torch.tensor(steps)})["decode/tokens"]


def _run(graph: Path, given: Feeds) -> dict[str, Tensor]:
    with tempfile.TemporaryDirectory() as scratch:
        feeds, out = Path(scratch, "in.npz"), Path(scratch, "out.npz")
        arrays: dict[str, Any] = {name: values.numpy() for name, values in given.items()}
        numpy.savez(feeds, **arrays)
        command = [sys.executable, "-P", str(CHILD), str(graph), str(feeds), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
            raise CheckError(f"{printable(graph.name)}: onnxruntime does not run it ({printable(last)}); report it")
        with numpy.load(out) as held:
            return {name: torch.from_numpy(held[name]) for name in held.files}


def check(graph: Path) -> None:
    """CheckError unless onnx's own checker passes it."""
    import onnx

    try:
        onnx.checker.check_model(str(graph))
    except (onnx.checker.ValidationError, ValueError) as error:
        raise CheckError(f"{printable(graph.name)}: onnx.checker refuses it ({printable(error)}); report it") from error
