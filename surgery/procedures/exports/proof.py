"""proof: the graph computes what the model does, on inputs of several shapes.

Two comparisons, both against float64: with the merged weights as they are stored, where the floor is the noise of
float32 alone, and with the adapted model itself, where the rounding of the merged weights to their dtype counts too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from surgery.core.agreement import Agreements, Outputs, compare, floors, picked
from surgery.core.distance import Distance
from surgery.errors import CheckError, InputError, ValueRangeError, printable
from surgery.formats.onnx.example import Example
from surgery.formats.onnx.runtime import check, running
from surgery.hosts.tree import adapted_layers, replaced_modules
from surgery.hosts.twin import Decoded, adapted_twin, as_computed, as_stored, doubled, exactly, twin
from surgery.procedures.checking.exactly import as_merged
from surgery.procedures.exports.runs import Inputs, Prepare, prepared, refuse_empty, runs, shapes
from surgery.procedures.exports.tokens import require_tokens
from surgery.procedures.live.merged_state import plain_state
from surgery.procedures.live.switch import disable_adapters

MASK = "attention_mask"
Floors = Mapping[str, Distance]


@dataclass(frozen=True)
class Trial:
    """One run of the graph: the shapes of its inputs, and how far its outputs lie from the model's."""

    shapes: Mapping[str, tuple[int, ...]]
    merged: Agreements | None  # None where it is adapted by a slot
    adapted: Agreements | None  # None where there is no adapter
    adapter: str = ""  # in the slots

    @property
    def why(self) -> str:
        return next((one.why for one in self.compared if one.why), "")

    @property
    def compared(self) -> list[Agreements]:
        return [one for one in (self.merged, self.adapted) if one is not None]

    def to_json(self) -> dict[str, Any]:
        return {
            "shapes": {name: list(shape) for name, shape in self.shapes.items()},
            "adapter": self.adapter,
            "merged": None if self.merged is None else self.merged.to_json(),
            "adapted": None if self.adapted is None else self.adapted.to_json(),
        }


@dataclass(frozen=True)
class Proof:
    """All runs of a graph, and what could not be compared."""

    trials: Sequence[Trial]
    left_out: str = ""
    by_layers: bool = False  # the model's weights were read as its layers ran, for it did not fit into memory

    @property
    def ok(self) -> bool:
        return all(not one.why for one in self.trials)

    def require(self, out: Path) -> None:
        """CheckError telling the first run that is unlike the model's."""
        wrong = next((one for one in self.trials if one.why), None)
        if wrong is not None:
            shapes = ", ".join(f"{name} {list(shape)}" for name, shape in wrong.shapes.items())
            raise CheckError(
                f"{printable(out)}: onnxruntime computes otherwise than the model{_under(wrong.adapter)}, "
                f"for {shapes}: {wrong.why}; nothing was written; report it with the versions of torch and onnxruntime"
            )

    def summary(self) -> str:
        """One line."""
        if not self.trials:
            return self.left_out
        error = max(one.found.error for trial in self.trials for one in trial.compared[0].outputs)
        how = " layer by layer" if self.by_layers else ""
        told = f"equal to the model within {error:.2g} of the largest output, in {len(self.trials)} runs{how}"
        return f"{told}; {self.left_out}" if self.left_out else told

    def to_json(self) -> dict[str, Any]:
        how = {"by_layers": self.by_layers, "left_out": self.left_out}
        return {"ok": self.ok, "trials": [one.to_json() for one in self.trials], **how}


class Reference(NamedTuple):
    """What the adapted model gives, for each of the inputs: in float64, in its own dtype, and without adapters."""

    exact: Sequence[Outputs]
    own: Sequence[Outputs]
    base: Sequence[Outputs] | None
    again: Callable[[], nn.Module] | None = None  # the adapted model, whenever it is asked for after the graph is run


def reference_of(
    root: nn.Module, example: Example, prepare: Prepare, again: Callable[[], nn.Module] | None = None
) -> Reference | None:
    """None of a model without active adapters, or of one that they are merged into. CheckError if they do nothing.

    `again` makes it anew where the model is to be freed meanwhile.
    """
    if not any(layer.running for layer in adapted_layers(root).values()) and not replaced_modules(root):
        return None
    inputs = example.trials()
    own = runs(prepared(adapted_twin(root, as_stored), prepare), inputs, example)
    double = prepared(adapted_twin(root, doubled), prepare)
    exact = runs(double, inputs, example)
    with disable_adapters(double):
        base = runs(double, inputs, example)
    if all(torch.equal(one[name], other[name]) for one, other in zip(exact, base, strict=True) for name in one):
        raise CheckError(
            "export: the adapters change no output, so that no run could tell a right export from one without them; "
            "train them, or eject them"
        )
    return Reference(exact, own, base, again or (lambda: root))


class Claim(NamedTuple):
    """That a graph computes what a model does, on such inputs."""

    graph: Path
    example: Example
    prepare: Prepare  # so that the model runs as it was traced


class Tried(NamedTuple):
    """The runs of a graph, beside those of the plain model and of the adapted one."""

    claim: Claim
    found: Sequence[Outputs]
    plain: Reference
    adapted: Reference | None
    dtypes: Mapping[str, torch.dtype]  # of the plain model's tensors

    def proof(self) -> Proof:
        """What they tell, once the adapted model is at hand again.

        What an exact merge in these dtypes moves is known, and taken off where that matters: it may be more than noise.
        """
        inputs, by = self.claim.example.trials(), self.adapted
        merged = judged(inputs, self.found, self.plain)
        over: Sequence[Agreements | None] = [None] * len(inputs)
        if by is not None:
            over = told = judged(inputs, self.found, by)
            if by.again is not None and any(one.why for one in told) and not any(one.why for one in merged):
                moved = by._replace(exact=self._moved(by, by.again()))
                again = judged(inputs, self.found, moved, floors_of(inputs, self.plain))
                over = [one.settled(other) if one.why else one for one, other in zip(told, again, strict=True)]
        return Proof([Trial(shapes(feeds), one, other) for feeds, one, other in zip(inputs, merged, over, strict=True)])

    def _moved(self, by: Reference, model: nn.Module) -> list[Outputs]:
        double, example = prepared(adapted_twin(model, doubled), self.claim.prepare), self.claim.example
        told = zip(example.trials(), by.exact, strict=True)
        try:
            return [as_merged(true, double, partial(_run, one, example), self.dtypes) for one, true in told]
        except ValueRangeError:  # of factors that have no exact merge
            return [*by.exact]


def prove(model: nn.Module, claim: Claim, adapted: Reference | None, decoded: Decoded = exactly) -> Tried:
    """By the plain model that the graph is of; its quantized weights are as `decoded` gives them."""
    graph, example, prepare = claim
    check(graph)
    inputs = example.trials()
    with running(graph, inputs) as outputs:
        plain = prepared(twin(model, as_computed, decoded), prepare)
        own = runs(plain, inputs, example)
        refuse_empty(plain, inputs, own, example)
        exact = runs(prepared(twin(model, doubled, decoded), prepare), inputs, example)
        found = outputs()
    if example.decoding is not None:
        require_tokens(plain, graph, example.decoding)
    by = Reference(exact, own, None)
    if any(one.why for one in judged(inputs, found, by)):
        _refuse_changing(plain, own, runs(plain, inputs, example))
    dtypes = {name: values.dtype for name, values in plain_state(model).items() if values.is_floating_point()}
    return Tried(claim, found, by, adapted, dtypes)


def _run(inputs: Inputs, example: Example, model: nn.Module) -> Outputs:
    return runs(model, [inputs], example)[0]


def _refuse_changing(model: nn.Module, first: Sequence[Outputs], again: Sequence[Outputs]) -> None:
    """InputError where the model does not give the same once more: it counts its runs, or draws numbers."""
    for one, other in zip(first, again, strict=True):
        for name, values in one.items():
            if not torch.equal(values.nan_to_num(), other[name].nan_to_num()):
                raise InputError(
                    f"a {printable(type(model).__name__)}: its output {printable(name)} changes when it runs once more "
                    "on the same inputs, so that nothing can be compared with it; a module that keeps nothing from one "
                    "run to the next is wanted"
                )


def trials_of(inputs: Sequence[Inputs], found: Sequence[Outputs], by: Reference, adapter: str) -> list[Trial]:
    """Runs with an adapter in the slots."""
    told = judged(inputs, found, by)
    return [Trial(shapes(feeds), None, one, adapter) for feeds, one in zip(inputs, told, strict=True)]


def _under(adapter: str) -> str:
    return f" under {printable(adapter)}" if adapter else ""


def judged(
    inputs: Sequence[Inputs], found: Sequence[Outputs], by: Reference, floor: Sequence[Floors] = ()
) -> list[Agreements]:
    """Each run. Where float64 gives no finite numbers (BLOOM's, where a row is padded), the model's own dtype does
    in its place, with the noise floor of another run."""
    masks = [feeds.get(MASK) for feeds in inputs]
    floor = floor or floors_of(inputs, by)
    sound = [i for i, mask in enumerate(masks) if _finite(by.exact[i], mask)]
    told = []
    for i, mask in enumerate(masks):
        exact = i in sound or not sound or not _finite(by.own[i], mask)
        true, of = (by.exact[i], floor[i]) if exact else (by.own[i], floor[sound[-1]])
        told.append(compare(true, found[i], of, None if by.base is None or not exact else by.base[i], mask))
    return told


def floors_of(inputs: Sequence[Inputs], by: Reference) -> list[Floors]:
    """Of each run."""
    return [floors(own, exact, feeds.get(MASK)) for feeds, own, exact in zip(inputs, by.own, by.exact, strict=True)]


def _finite(outputs: Outputs, mask: Tensor | None) -> bool:
    return all(bool(torch.isfinite(picked(values, mask)).all()) for values in outputs.values())
