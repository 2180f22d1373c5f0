"""runtime: a graph run by onnxruntime, in a process of its own, which gives all its memory back."""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from surgery.errors import CheckError, printable

CHILD = Path(__file__).with_name("child.py")
Feeds = Mapping[str, Tensor]


def run(graph: Path, trials: Sequence[Feeds], adapter: Path | None = None) -> list[dict[str, Tensor]]:
    """The outputs of each trial by name, with an .onnx_adapter file in the slots if one is given.

    CheckError if onnxruntime cannot open or run the graph.
    """
    with running(graph, trials, adapter) as outputs:
        return outputs()


@contextmanager
def running(
    graph: Path, trials: Sequence[Feeds], adapter: Path | None = None
) -> Iterator[Callable[[], list[dict[str, Tensor]]]]:
    """The same, beside what is done meanwhile; what is given waits for the outputs."""
    feeds = {f"{i}/{name}": values for i, given in enumerate(trials) for name, values in given.items()}
    with _child(graph, feeds, adapter) as told:
        yield lambda: _by_trial(told(), len(trials))


def decode(graph: Path, prompt: Tensor, steps: int) -> Tensor:
    """The tokens that a decoder with a cache finds to be the most probable after `prompt` [1, length]; [steps]."""
    with _child(graph, {"decode/prompt": prompt, "decode/steps": torch.tensor(steps)}, None) as told:
        return told()["decode/tokens"]


def _by_trial(told: Feeds, count: int) -> list[dict[str, Tensor]]:
    found: list[dict[str, Tensor]] = [{} for _ in range(count)]
    for key, values in told.items():
        trial, _, name = key.partition("/")
        found[int(trial)][name] = values
    return found


@contextmanager
def _child(graph: Path, given: Feeds, adapter: Path | None) -> Iterator[Callable[[], dict[str, Tensor]]]:
    """A process at work; what is given waits for it. It ends with the block."""
    with tempfile.TemporaryDirectory() as scratch:
        feeds, out = Path(scratch, "in.npz"), Path(scratch, "out.npz")
        arrays: dict[str, Any] = {name: values.numpy() for name, values in given.items()}
        numpy.savez(feeds, **arrays)
        words = list(map(str, (sys.executable, "-P", CHILD, graph, feeds, out, *((adapter,) if adapter else ()))))
        with subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as child:
            try:
                yield partial(_ended, child, graph, out)
            finally:
                child.kill()


def _ended(child: "subprocess.Popen[str]", graph: Path, out: Path) -> dict[str, Tensor]:
    """What it has written. CheckError if it failed."""
    _, said = child.communicate()
    if child.returncode:
        last = (said.strip().splitlines() or [f"it ended with {child.returncode}"])[-1]
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
