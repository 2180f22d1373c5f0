"""proof_by_layers: a graph compared with a model larger than memory, whose weights are read as its layers run."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from surgery.core.agreement import Outputs
from surgery.core.site import Site
from surgery.errors import MatchError, printable
from surgery.formats.onnx.runtime import check, run
from surgery.hosts.checkpoint import Checkpoint
from surgery.hosts.streamed import held_elements, streamed
from surgery.io.lazy import Lazy
from surgery.procedures.exports.proof import Claim, Proof, Reference, Trial, judged
from surgery.procedures.exports.runs import prepared, runs, shapes

# For each weight at hand: as it is stored, in float64, and what onnxruntime casts or decodes it to.
_BYTES = 20


class Files:
    """A model's tensors by name, in a checkpoint that may call them otherwise, or hold them in codes."""

    def __init__(self, files: Checkpoint, names: Mapping[str, Sequence[str]], made: Mapping[str, Lazy]) -> None:
        self.files, self.names, self.made = files, names, made

    def __call__(self, name: str, rows: slice | None = None) -> Tensor:
        """It, or some rows of its first axis; codes are decoded in float32. MatchError if it is not there."""
        group = (name, *self.names.get(name, ()))
        lazy = next((self.made[one] for one in group if one in self.made), None)
        if lazy is not None:
            return lazy.load() if rows is None else lazy.load()[rows]
        found = next((one for one in group if self.files.info(one) is not None), None)
        if found is None:
            raise MatchError(f"{printable(self.files.path)}: no tensor {printable(name)}, which the model has")
        info = self.files.info(found)
        assert info is not None
        packed = self.files.load(Site(found, {"weight": info}), rows)
        held = self.files.packed.get(found)
        return packed.tensors["weight"] if held is None else held.codec.decode(packed, torch.float32)


def bytes_by_layers(model: nn.Module) -> int:
    """How much memory it takes to compare so."""
    largest = max((held.numel() for held in model.parameters()), default=0)
    return _BYTES * held_elements(model) + 4 * largest  # onnxruntime casts a weight whole


def prove_by_layers(model: nn.Module, claim: Claim, read: Files, base: Files | None) -> Proof:
    """By a model without weights and where they are; in one run, the example's own.

    With the `base` before adapters were merged, their effect must stand out from the error.
    """
    check(claim.graph)
    inputs = [claim.example.trials()[1]]

    def outputs(files: Files, dtype: torch.dtype) -> Sequence[Outputs]:
        return runs(prepared(streamed(model, files, dtype), claim.prepare), inputs, claim.example)

    exact, own = outputs(read, torch.float64), outputs(read, torch.float32)
    by = Reference(exact, own, None if base is None else outputs(base, torch.float64))
    found = judged(inputs, run(claim.graph, inputs), by)
    return Proof([Trial(shapes(feeds), one, None) for feeds, one in zip(inputs, found, strict=True)], by_layers=True)
