"""runtime: a graph run by onnxruntime, in a process of its own, which gives all its memory back."""

import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy
import torch
from torch import Tensor

from surgery.errors import CheckError, printable

CHILD = Path(__file__).with_name("child.py")
Feeds = Mapping[str, Tensor]


def run(graph: Path, trials: Sequence[Feeds]) -> list[dict[str, Tensor]]:
    """The outputs of each trial by name. CheckError if onnxruntime cannot open or run the graph."""
    with tempfile.TemporaryDirectory() as scratch:
        given, out = Path(scratch, "in.npz"), Path(scratch, "out.npz")
        arrays = {f"{i}/{name}": values.numpy() for i, feeds in enumerate(trials) for name, values in feeds.items()}
        numpy.savez(given, **arrays)  # type: ignore[arg-type]  # it takes any names
        command = [sys.executable, "-P", str(CHILD), str(graph), str(given), str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
            raise CheckError(f"{printable(graph.name)}: onnxruntime does not run it ({printable(last)}); report it")
        found: list[dict[str, Tensor]] = [{} for _ in trials]
        with numpy.load(out) as held:
            for key in held.files:
                trial, _, name = key.partition("/")
                found[int(trial)][name] = torch.from_numpy(held[key])
    return found


def check(graph: Path) -> None:
    """CheckError unless onnx's own checker passes it."""
    import onnx

    try:
        onnx.checker.check_model(str(graph))
    except (onnx.checker.ValidationError, ValueError) as error:
        raise CheckError(f"{printable(graph.name)}: onnx.checker refuses it ({printable(error)}); report it") from error
