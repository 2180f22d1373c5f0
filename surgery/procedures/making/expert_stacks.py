"""Parameters of a base that an adapter holds by `target_parameters`: stacks of experts, whole in files or in pieces."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from surgery.codecs.plain import PLAIN_DTYPES
from surgery.core.names import suffix_hits
from surgery.core.op import Op
from surgery.core.site import Site, TensorInfo
from surgery.hosts.checkpoint import Checkpoint
from surgery.ops.experts import parameter_op
from surgery.ops.linear import LAYOUTS
from surgery.procedures.making.tuning import OwnNames, whole
from surgery.procedures.places.experts import STRAIGHT_FAMILIES, TRANSPOSED_FAMILIES
from surgery.procedures.places.parameters import ORDER
from surgery.procedures.places.pieces import Pieces


class Rows(NamedTuple):
    """Some rows of the first axis of a tensor of the files; all where None."""

    info: TensorInfo
    rows: slice | None = None


@dataclass(frozen=True)
class Stack:
    """A parameter by its name in memory, and of each of its matrices what files hold of it, one below another."""

    site: Site
    experts: Sequence[Sequence[Rows]]

    def infos(self) -> dict[str, TensorInfo]:
        """What a fingerprint tells of it: the parameter where files hold it whole, else their own tensors."""
        pieces = {one.info.name: one.info for expert in self.experts for one in expert}
        parameter = self.site.weight
        return {self.site.name: parameter} if parameter.name in pieces else pieces

    def matrix(self, source: Checkpoint, expert: int) -> Tensor:
        """[rows, columns] of one expert, as it is stored in memory."""
        parts = [whole(source, source.at[info.name][1].info, rows) for info, rows in self.experts[expert]]
        return torch.cat([one.flatten(0, -2) for one in parts])


class Stacks:
    """Those of a base, by the tensors that files hold of them. `ops` tell how matrices lie that no family tells of."""

    def __init__(self, base: Checkpoint, own: OwnNames, ops: Mapping[str, str]) -> None:
        self.family, self.own, self.ops = base.config.get("model_type"), own, ops
        self._pieces: dict[str, Pieces] = {}
        self._whole_of: dict[str, str] = {}  # by the tensor that is a piece, the parameter
        for info in base.weights():
            part = own.part(info.name)
            if part is not None:
                self._pieces.setdefault(part.whole, Pieces(part.stack)).add(part, info)
                self._whole_of[info.name] = part.whole

    def name(self, info: TensorInfo) -> str | None:
        """The parameter that a tensor is, or is a piece of; None for what no LoRA of parameters is made of."""
        if info.dtype not in PLAIN_DTYPES:
            return None
        if info.name in self._whole_of:
            return self._whole_of[info.name]
        return self.own.of(info.name) if self._op(info) is not None else None

    def of(self, name: str, info: TensorInfo) -> Stack:
        """The stack of this name, which `info` is a tensor of. MatchError where pieces are missing."""
        if name in self._pieces:
            pieces = self._pieces[name]
            parameter = pieces.whole(name)
            held: list[list[Rows]] = [[] for _ in range(pieces.experts)]
            for expert, _, piece in pieces.rows():
                held[expert].append(Rows(piece))
            return Stack(Site(name, {"weight": parameter}, _op_of(name, parameter, False)), held)
        op = self._op(info)
        assert op is not None
        held = [[Rows(info, slice(one, one + 1))] for one in range(op.stack)] or [[Rows(info)]]
        return Stack(Site(name, {"weight": info}, op), held)

    def _op(self, info: TensorInfo) -> Op | None:
        """Of a tensor that is a parameter by itself; None where nothing tells how its matrices lie."""
        name = info.name
        if name.endswith(".weight") or "." not in name or len(info.shape) not in (2, 3) or 0 in info.shape:
            return None
        for entry in suffix_hits(self.ops.keys(), name):
            told = self.ops[entry]
            return _op_of(name, info, told == "conv1d") if told in LAYOUTS else None
        known = self.family in TRANSPOSED_FAMILIES | STRAIGHT_FAMILIES and name.rpartition(".")[2] in ORDER
        return _op_of(name, info, self.family in TRANSPOSED_FAMILIES) if known else None


def _op_of(name: str, info: TensorInfo, is_transposed: bool) -> Op:
    return parameter_op(name.rpartition(".")[2], info.shape, is_transposed)
