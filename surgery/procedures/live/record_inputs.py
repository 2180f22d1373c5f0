"""record_inputs: the second moment of what each linear layer of a model gets, in few rows, for rounding by them.

The sum S of x x' is never held: of it Y = S O is, with O [in, k] random and seeded, from which Nystroem's method gives
the part of S that is largest, Y (O'Y)^-1 Y'; and the sum of squares by input, for the rest.
https://arxiv.org/abs/1706.05736
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.core.names import suffix_hits
from surgery.core.option_checks import check_whole
from surgery.core.select import refuse_unmatched
from surgery.core.site import TensorInfo
from surgery.errors import MatchError, UsageError, ValueRangeError, printable
from surgery.hosts.calibration import INPUTS, MOST, REST
from surgery.hosts.recognition import op_of
from surgery.hosts.tree import places
from surgery.io.lazy import Lazy, write_tensors
from surgery.io.staging import Staging
from surgery.layers import Adapted, Replaced
from surgery.ops.linear import Linear
from surgery.procedures.checking.outputs import evaluating
from surgery.procedures.live.examples import Batch, Examples, refuse_meta

FILE = "calibration.safetensors"
_MORE = 8  # columns beside those that are kept, by which these come out better
_LARGEST = 2.0**63  # of inputs: the means of their squares are written in float32
_LEAST = 1e-10  # of the largest eigenvalue: those below are noise of float32


@dataclass(frozen=True)
class Recording:
    """What was recorded: of how many inputs, by module."""

    out: Path
    counts: Mapping[str, int]
    sha256: str

    def summary(self) -> str:
        """One line."""
        return f"{printable(self.out)}: inputs of {len(self.counts)} modules, up to {max(self.counts.values())} of each"


class Moments:
    """Of one module's inputs, streaming: memory is that of a few inputs for each row that is kept."""

    def __init__(self, columns: int, rank: int) -> None:
        drawn = torch.Generator().manual_seed(0)
        self.rank, self.count = min(rank, columns), 0
        width = min(columns, rank + _MORE)
        self.sketch = torch.randn(columns, width, generator=drawn, dtype=torch.float64)
        self.seen = torch.zeros(columns, width, dtype=torch.float64)
        self.squares = torch.zeros(columns, dtype=torch.float64)

    def add(self, inputs: Tensor) -> None:
        """[n, in]"""
        wide = inputs.to(device="cpu", dtype=torch.float64)
        self.count += len(wide)
        self.seen += wide.T @ (wide @ self.sketch)
        self.squares += (wide * wide).sum(dim=0)

    def rows(self) -> tuple[Tensor, Tensor]:
        """Rows [rank, in] with nearly that second moment, and the mean squares [in] of what they lack."""
        inner = self.sketch.T @ self.seen
        values, vectors = torch.linalg.eigh((inner + inner.T) / 2)
        kept = values > _LEAST * values[-1].clamp(min=torch.finfo(torch.float64).tiny)
        factor = self.seen @ (vectors[:, kept] / values[kept].sqrt())  # [in, k], S is about factor factor'
        left, sizes, _ = torch.linalg.svd(factor, full_matrices=False)
        largest = left[:, : self.rank] * (sizes[: self.rank] / self.count**0.5)
        rest = (self.squares / self.count - (largest * largest).sum(dim=1)).clamp(min=0)
        rows = largest.T if largest.shape[1] else torch.zeros(1, len(rest), dtype=torch.float64)
        return rows * len(rows) ** 0.5, rest


def record_inputs(  # noqa: PLR0913, PLR0917  # three things and their options
    root: nn.Module, examples: Examples, out: Path, targets: Sequence[str] | None, rank: int, overwrite: bool
) -> Recording:
    """Run the model in eval mode, and write what its linear layers get, by their paths, to a new folder of one file.

    Raises MatchError for an entry that hits nothing, UsageError where none is called, StateError without weights,
    ValueRangeError.
    """
    check_whole("record_inputs: rank", rank, 1, MOST)
    refuse_meta(root)
    moments: dict[str, Moments] = {}
    modules, batch = _chosen(root, targets), Batch()
    with Staging(out, overwrite=overwrite) as staging:
        with evaluating(root), _hooked(modules, moments, batch, rank), torch.no_grad():
            for given in examples:
                batch.run(root, given)
        if not moments:
            raise UsageError("record_inputs: no linear layer was called; give batches that the model is called with")
        sha256 = write_tensors(staging, FILE, _tensors(moments))
    return Recording(out, {name: one.count for name, one in moments.items()}, sha256)


def _chosen(root: nn.Module, targets: Sequence[str] | None) -> dict[str, nn.Module]:
    """The linear layers by their paths without wrappers; each once."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for place in places(root):
        module = place.module.innermost if isinstance(place.module, Adapted) else place.module
        op = None if isinstance(module, Replaced) else op_of(module)
        if op is not None and op.name == Linear.name and id(place.module) not in seen:
            found[place.name] = place.module
            seen.add(id(place.module))
    refuse_unmatched("targets", [one for one in targets or () if not any(suffix_hits((one,), n) for n in found)], found)
    chosen = {name: one for name, one in found.items() if targets is None or suffix_hits(targets, name)}
    if not chosen:
        raise MatchError("record_inputs: the model has no linear layer; there is nothing to record")
    return chosen


@contextmanager
def _hooked(modules: Mapping[str, nn.Module], moments: dict[str, Moments], batch: Batch, rank: int) -> Iterator[None]:
    def see(name: str, _: nn.Module, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        inputs: Tensor = given[0] if given else next(iter(named.values()))
        rows = batch.counted(inputs.detach())
        if rows.numel():
            _check_inputs(name, rows)
            moments.setdefault(name, Moments(rows.shape[1], rank)).add(rows)

    handles = [one.register_forward_pre_hook(partial(see, name), with_kwargs=True) for name, one in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_inputs(name: str, rows: Tensor) -> None:
    """ValueRangeError for what no moment in float32 could be of."""
    largest = float(rows.abs().amax())
    if not math.isfinite(largest):
        raise ValueRangeError(f"{printable(name)}: it gets NaN or infinity; finite inputs are wanted; see to the model")
    if largest > _LARGEST:
        raise ValueRangeError(
            f"{printable(name)}: it gets inputs of {largest:.3g}; such up to {_LARGEST:.3g} are wanted, whose squares "
            "float32 holds; see to the model"
        )


def _tensors(moments: Mapping[str, Moments]) -> dict[str, Lazy]:
    """In float32."""
    found = {}
    for name, one in sorted(moments.items()):
        columns, rows = len(one.squares), one.rows()
        shapes = ((INPUTS, (len(rows[0]), columns)), (REST, (columns,)))
        for (ending, shape), values in zip(shapes, rows, strict=True):
            info = TensorInfo(name + ending, torch.float32, shape)
            found[name + ending] = Lazy(info, partial(values.to, torch.float32))
    return found
