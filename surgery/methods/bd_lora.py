"""BD-LoRA: LoRA of which one factor is block-diagonal, and held as its blocks. PEFT's `use_bdlora`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from surgery.core.elementwise import Shift
from surgery.core.method import Dense, Method, Params, Product, Run
from surgery.core.op import Op, Tile
from surgery.core.site import Site
from surgery.core.spec import Spec
from surgery.errors import ConfigError, MatchError, printable, quoted
from surgery.methods.lora import Lora

_OPS = frozenset({"linear", "conv1d"})
_FIELDS: Mapping[str, Any] = {
    "target_modules_bd_a": None,
    "target_modules_bd_b": None,
    "nblocks": 1,
    "match_strict": True,
}


class Blocks(NamedTuple):
    """Which factor is block-diagonal, and in how many blocks."""

    role: Literal["A", "B"]
    number: int


@dataclass(frozen=True)
class BdLora(Method):
    """LoRA's tensors; A is [r, in / blocks], or B is [out, r / blocks]: the blocks one below another."""

    lora: Lora
    blocks: Blocks

    name = "BD-LoRA"
    couples = frozenset()

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        if site.acting.name not in _OPS:
            raise MatchError(
                f"{printable(site.name)}: its op is {site.acting.name}; use_bdlora is for Linear and Conv1D; exclude it"
            )
        found = dict(self.lora.tensors(site))
        spec, number = found[self.blocks.role], self.blocks.number
        if any(extent % number for extent in spec.shape):
            raise MatchError(
                f"{printable(site.name)}: use_bdlora asks for {number} blocks, and its {self.blocks.role} is "
                f"{list(spec.shape)}; both must be multiples of it; choose other nblocks, or another r"
            )
        found[self.blocks.role] = spec._replace(shape=(spec.shape[0], spec.shape[1] // number))
        return found

    def matrices(self, p: Params, site: Site) -> Params:  # noqa: ARG002  # the shapes tell all
        return self._whole(p)

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:
        """As PEFT: the factor in blocks begins by itself, B as zeros whatever `init_lora_weights` is."""
        shape = self.tensors(site)[self.blocks.role].shape
        blocks = torch.zeros(shape)
        if self.blocks.role == "A":
            bound = (6 / shape[1]) ** 0.5
            blocks.uniform_(-bound, bound)
        return {**self.lora.init(site, base), self.blocks.role: blocks}

    def merge(self, base: Dense, p: Params, tile: Tile, product: Product) -> Dense:
        return self.lora.merge(base, p, tile, product)

    def steps(self, p: Params, tile: Tile, product: Product) -> Shift:
        return self.lora.steps(p, tile, product)

    def spread(self, p: Params, tile: Tile) -> Tensor:
        return self.lora.spread(p, tile)

    def settings(self) -> Mapping[str, str]:
        return {**self.lora.settings(), "blocks": f"{self.blocks.number} of {self.blocks.role}"}

    def weighted(self, weight: float) -> Self:
        return replace(self, lora=self.lora.weighted(weight))

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:
        return self.lora.branch(x, run, op, self._whole(p), training)

    def _whole(self, p: Params) -> Params:
        """With zeros beside the blocks."""
        role, number = self.blocks
        whole: Tensor = torch.block_diag(*p[role].chunk(number))  # type: ignore[no-untyped-call]
        return {**p, role: whole}


def check_blocks(value: object) -> None:
    """ConfigError for what does not say which factors are block-diagonal, as PEFT's BdLoraConfig does."""
    if value is None:
        return
    if not isinstance(value, Mapping) or not {*value} <= {*_FIELDS}:
        raise ConfigError(f"use_bdlora is {quoted(value)}; a table of {', '.join(_FIELDS)} is wanted")
    told = {**_FIELDS, **value}
    for field in ("target_modules_bd_a", "target_modules_bd_b"):
        names: Any = told[field] or []
        if not isinstance(names, list | tuple) or not all(isinstance(name, str) and name for name in names):
            raise ConfigError(f"use_bdlora: {field} is {quoted(names)}; a list of parts of names is wanted")
    count, strict = told["nblocks"], told["match_strict"]
    if type(count) is not int or not 1 <= count < 1 << 31 or not isinstance(strict, bool):
        raise ConfigError("use_bdlora: nblocks must be a whole number from 1, and match_strict true or false")


def blocks_of(value: Mapping[str, Any], name: str) -> Blocks | None:
    """Those of the module `name`, of whose last part PEFT's entries are parts; None where it is plain LoRA.

    ConfigError for one that both lists mean, or neither where `match_strict` asks that one does.
    """
    told, last = {**_FIELDS, **value}, name.rpartition(".")[2]
    in_a, in_b = (_part_of(told[field] or (), last) for field in ("target_modules_bd_a", "target_modules_bd_b"))
    if in_a and in_b:
        raise ConfigError(f"use_bdlora: both lists mean {printable(name)}; only one factor can be block-diagonal")
    if told["match_strict"] and not (in_a or in_b):
        raise ConfigError(f"use_bdlora: no entry means {printable(name)}; add one, or set match_strict to false")
    return Blocks("A" if in_a else "B", told["nblocks"]) if in_a or in_b else None


def _part_of(entries: Sequence[str], last: str) -> bool:
    return any(entry in last for entry in entries)
