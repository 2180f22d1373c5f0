"""proof: the graph computes what the model does, on inputs of several shapes.

Two comparisons, both against float64: with the merged weights as they are stored, where the floor is the noise of
float32 alone, and with the adapted model itself, where the rounding of the merged weights to their dtype counts too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from surgery.core.agreement import Agreements, Outputs, compare, floors
from surgery.errors import CheckError, printable
from surgery.formats.onnx.example import Example
from surgery.formats.onnx.runtime import check, run
from surgery.formats.onnx.trace import outputs_of
from surgery.hosts.tree import adapted_layers, replaced_modules
from surgery.hosts.twin import adapted_twin, as_computed, as_stored, doubled, twin
from surgery.procedures.switch import disable_adapters

MASK = "attention_mask"
Inputs = Mapping[str, Tensor]
Prepare = Callable[[nn.Module], None]


@dataclass(frozen=True)
class Trial:
    """One run of the graph: the shapes of its inputs, and how far its outputs lie from the model's."""

    shapes: Mapping[str, tuple[int, ...]]
    merged: Agreements
    adapted: Agreements | None  # None where there is no adapter

    @property
    def why(self) -> str:
        return self.merged.why or (self.adapted.why if self.adapted is not None else "")

    def to_json(self) -> dict[str, Any]:
        return {
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "merged": self.merged.to_json(),
            "adapted": None if self.adapted is None else self.adapted.to_json(),
        }


@dataclass(frozen=True)
class Proof:
    """All runs of a graph."""

    trials: Sequence[Trial]

    @property
    def ok(self) -> bool:
        return all(not one.why for one in self.trials)

    def require(self, out: Path) -> None:
        """CheckError telling the first run that is unlike the model's."""
        wrong = next((one for one in self.trials if one.why), None)
        if wrong is not None:
            shapes = ", ".join(f"{name} {list(shape)}" for name, shape in wrong.shapes.items())
            raise CheckError(
                f"{printable(out)}: onnxruntime computes otherwise than the model, for {shapes}: {wrong.why}; "
                "nothing was written; report it with the versions of torch and onnxruntime"
            )

    def summary(self) -> str:
        """One line."""
        error = max(one.found.error for trial in self.trials for one in trial.merged.outputs)
        return f"equal to the model within {error:.2g} of the largest output, on {len(self.trials)} shapes"

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, "trials": [one.to_json() for one in self.trials]}


class Reference(NamedTuple):
    """What the adapted model gives, for each of the inputs: in float64, in its own dtype, and without adapters."""

    exact: Sequence[Outputs]
    own: Sequence[Outputs]
    base: Sequence[Outputs]


def reference_of(root: nn.Module, example: Example) -> Reference | None:
    """None of a model without active adapters, or of one that they are merged into. CheckError if they do nothing."""
    if not any(layer.running for layer in adapted_layers(root).values()) and not replaced_modules(root):
        return None
    inputs = example.trials()
    own = runs(adapted_twin(root, as_stored), inputs, example)
    double = adapted_twin(root, doubled)
    exact = runs(double, inputs, example)
    with disable_adapters(double):
        base = runs(double, inputs, example)
    if all(torch.equal(one[name], other[name]) for one, other in zip(exact, base, strict=True) for name in one):
        raise CheckError(
            "export: the adapters change no output, so that no run could tell a right export from one without them; "
            "train them, or eject them"
        )
    return Reference(exact, own, base)


def prove(model: nn.Module, example: Example, graph: Path, prepare: Prepare, adapted: Reference | None) -> Proof:
    """Of a graph, by the plain model that it is of."""
    check(graph)
    inputs = example.trials()
    own = runs(prepared(twin(model, as_computed), prepare), inputs, example)
    exact = runs(prepared(twin(model, doubled), prepare), inputs, example)
    found = run(graph, inputs)
    trials = []
    for i, feeds in enumerate(inputs):
        rows = feeds.get(MASK)
        merged = compare(exact[i], found[i], floors(own[i], exact[i], rows), rows=rows)
        over = None
        if adapted is not None:
            floor = floors(adapted.own[i], adapted.exact[i], rows)
            over = compare(adapted.exact[i], found[i], floor, adapted.base[i], rows)
        trials.append(Trial({name: tuple(values.shape) for name, values in feeds.items()}, merged, over))
    return Proof(trials)


def prepared(model: nn.Module, prepare: Prepare) -> nn.Module:
    prepare(model)
    return model


def runs(model: nn.Module, trials: Sequence[Inputs], example: Example) -> list[dict[str, Tensor]]:
    """The model's outputs, its floating inputs in the dtype that it is of."""
    dtype = next((one.dtype for one in model.parameters() if one.is_floating_point()), torch.float32)
    with torch.no_grad():
        return [
            {
                name: values.detach()
                for name, values in outputs_of(model, {**_cast(one, dtype), **example.fixed}).items()
            }
            for one in trials
        ]


def _cast(inputs: Inputs, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: values.to(dtype) if values.is_floating_point() else values for name, values in inputs.items()}
