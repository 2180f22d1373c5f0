"""diff: what differs between two checkpoints, however each is cut into files: names, shapes, dtypes, values, config."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from surgery.core.site import TensorInfo
from surgery.core.workers import default_workers, in_order
from surgery.errors import CheckError, printable
from surgery.hosts.checkpoint import Checkpoint
from surgery.procedures.checking.config_difference import Sides, config_difference
from surgery.procedures.checking.difference import Difference, difference
from surgery.procedures.checking.report import Case, CaseReport
from surgery.procedures.checking.spans import read_span, spans

_SAID = {
    "equal": "equal",
    "values": "of other values",
    "dtype": "of another dtype",
    "shape": "of another shape",
    "only in a": "only in A",
    "only in b": "only in B",
    "config": "in config.json",
}


class Pair(NamedTuple):
    """A tensor's headers in both checkpoints, None where it is absent; and how its values differ, of equal shapes."""

    a: TensorInfo | None
    b: TensorInfo | None
    difference: Difference | None = None

    @property
    def what(self) -> str:
        """equal, values, dtype (of the same values), shape, only in a, only in b."""
        if self.a is None or self.b is None:
            return "only in b" if self.a is None else "only in a"
        if self.difference is None:
            return "shape"
        if self.difference.differing:
            return "values"
        return "equal" if self.a.dtype == self.b.dtype else "dtype"

    def to_json(self) -> dict[str, Any]:
        sides = {"a": self.a, "b": self.b}
        told: dict[str, Any] = {
            "what": self.what,
            "dtype": {side: info and _dtype(info) for side, info in sides.items()},
            "shape": {side: None if info is None else list(info.shape) for side, info in sides.items()},
        }
        return told | (self.difference.to_json() if self.difference is not None else {})


@dataclass(frozen=True, repr=False)
class DiffReport(CaseReport):
    """Every tensor of two checkpoints, in the order of the first; and the keys of config.json that differ.

    `equal` says whether nothing does, and `require` raises CheckError otherwise. Of a tensor, `what` is "equal",
    "values", "dtype", "shape", "only in a" or "only in b", and `difference` has the figures.
    """

    a: Path
    b: Path
    tensors: Mapping[str, Pair]
    config: Mapping[str, Sides]

    @property
    def equal(self) -> bool:
        """Nothing differs."""
        return not self.config and all(one.what == "equal" for one in self.tensors.values())

    def require(self) -> None:
        """CheckError if anything differs."""
        if not self.equal:
            both = f"{printable(self.a)}, {printable(self.b)}"
            raise CheckError(f"{both}: {self.summary()}; equal checkpoints are wanted; the table says what differs")

    @property
    def counts(self) -> dict[str, int]:
        """Tensors by what differs, and keys of config.json."""
        found = Counter(one.what for one in self.tensors.values())
        return {what: found[what] for what in _SAID} | {"config": len(self.config)}

    def summary(self) -> str:
        """One line."""
        return ", ".join(f"{n} {_SAID[what]}" for what, n in self.counts.items() if n or what == "equal")

    @property
    def title(self) -> str:
        return f"surgery diff {self.a} {self.b}"

    @property
    def columns(self) -> Sequence[str]:
        return "name", "what", "a -> b", *_FIGURES

    def cases(self) -> Iterator[Case]:
        """The tensors, then the keys of config.json; listed are those that differ."""
        for name, one in self.tensors.items():
            yield _case(name, one.what, _arrow(_header(one.a), _header(one.b)), _figures(one.difference))
        for path, sides in self.config.items():
            told = (json.dumps(sides[side]) if side in sides else "absent" for side in ("a", "b"))
            yield _case(f"config.json {path}", "config", _arrow(*told), _figures(None))

    def to_json(self) -> dict[str, Any]:
        return {
            "equal": self.equal,
            "counts": self.counts,
            "tensors": {name: one.to_json() for name, one in self.tensors.items()},
            "config": dict(self.config),
        }


def diff(a: Checkpoint, b: Checkpoint, workers: int | None = None) -> DiffReport:
    """What differs between `a` and `b`, streaming, `workers` tiles at once; the same for any number of them."""
    theirs = {info.name: info for info in b.tensors()}
    pairs = {info.name: Pair(info, theirs.pop(info.name, None)) for info in a.tensors()}
    pairs |= {name: Pair(None, info) for name, info in theirs.items()}

    def compare(piece: tuple[TensorInfo, TensorInfo, slice]) -> tuple[str, Difference]:
        one, other, span = piece
        x, y = read_span(a, one.name, span), read_span(b, one.name, span)
        return one.name, difference(x, y, one.dtype, other.dtype)

    for name, found in in_order(compare, _pieces(pairs.values()), workers or default_workers()):
        before = pairs[name].difference
        pairs[name] = pairs[name]._replace(difference=found if before is None else before.plus(found))
    a.check_unchanged()
    b.check_unchanged()
    return DiffReport(a.path, b.path, pairs, config_difference(a.config, b.config))


def _pieces(pairs: Iterable[Pair]) -> Iterator[tuple[TensorInfo, TensorInfo, slice]]:
    for a, b, _ in pairs:
        if a is not None and b is not None and a.shape == b.shape:
            yield from ((a, b, span) for span in spans(a))


_FIGURES = ("differing", "max abs error", "max ulps", "norm a", "norm a - b", "relative")


def _case(name: str, what: str, change: str, figures: Sequence[str]) -> Case:
    told = [change, *(f"{title} {figure}" for title, figure in zip(_FIGURES, figures, strict=True) if figure)]
    return Case(name, what, (change, *figures), what != "equal", "" if what == "equal" else "; ".join(told))


def _figures(found: Difference | None) -> Sequence[str]:
    """As text, empty where they are not told."""
    if found is None or found.differing is None:
        return [""] * len(_FIGURES)
    count = f"{found.differing:,} of {found.elements:,}"
    count += f" ({found.not_finite:,} not finite)" if found.not_finite else ""
    numbers = (found.max_abs_error, found.max_ulps, found.norm_a, found.norm_apart, found.relative)
    return [count, *("" if number is None else f"{number:.4g}" for number in numbers)]


def _arrow(a: str, b: str) -> str:
    return a if a == b else f"{a} -> {b}"


def _header(info: TensorInfo | None) -> str:
    return "absent" if info is None else f"{_dtype(info)} {list(info.shape)}"


def _dtype(info: TensorInfo) -> str:
    return str(info.dtype).removeprefix("torch.")
