"""QALoRA: W + scaling * B A over the mean of each group of inputs, times how many groups there are.

PEFT's `use_qalora`, which it heeds over the layers of GPTQ alone. It is a LoRA whose A has the same number for all
inputs of a group. https://arxiv.org/abs/2309.14717
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Self

from torch import Tensor
from torch.nn import functional as F

from surgery.core.elementwise import Shift
from surgery.core.method import Dense, Method, Params, Product, Run
from surgery.core.op import Op, Tile, in_dtype_of
from surgery.core.site import Site
from surgery.core.spec import Spec
from surgery.errors import ConfigError, MatchError, printable, quoted
from surgery.methods.kaiming import kaiming
from surgery.methods.lora import Lora


@dataclass(frozen=True)
class QaLora(Method):
    """A is [r, in / group], B is [out, r]."""

    lora: Lora
    group: int

    name = "QALoRA"
    couples = frozenset()

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        if site.acting.name != "linear":
            raise MatchError(
                f"{printable(site.name)}: its op is {site.acting.name}; use_qalora is for Linear; exclude it"
            )
        inputs = site.shape[1]
        if inputs % self.group:
            raise MatchError(
                f"{printable(site.name)}: it has {inputs} inputs, which are no whole groups of {self.group}; choose "
                "another qalora_group_size, or exclude it"
            )
        found = dict(self.lora.tensors(site))
        return found | {"A": found["A"]._replace(shape=(self.lora.r, inputs // self.group))}

    def matrices(self, p: Params, site: Site) -> Params:  # noqa: ARG002  # the group tells all
        return {**p, "A": p["A"].repeat_interleave(self.group, 1)}  # [r, in]

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:
        fresh, shape = self.lora.init(site, base), self.tensors(site)["A"].shape
        return {**fresh, "A": kaiming(shape)}

    def merge(self, base: Dense, p: Params, tile: Tile, product: Product) -> Dense:
        return self._over(p["A"].shape[1]).merge(base, p, tile, product)

    def steps(self, p: Params, tile: Tile, product: Product) -> Shift:
        return self._over(p["A"].shape[1]).steps(p, tile, product)

    def spread(self, p: Params, tile: Tile) -> Tensor:
        return self._over(p["A"].shape[1]).spread(p, tile)

    def settings(self) -> Mapping[str, str]:
        return {**self.lora.settings(), "group": str(self.group)}

    def weighted(self, weight: float) -> Self:
        return replace(self, lora=self.lora.weighted(weight))

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:
        below, A = run(x), p["A"]
        x = in_dtype_of(A, x)
        dropped = F.dropout(x, self.lora.dropout, training)
        pooled = dropped.reshape(*x.shape[:-1], -1, self.group).sum(-1)  # [*batch, in / group]
        return op.mix_onto(below, op.apply(pooled, A), p["B"], self._over(x.shape[-1]).scaling)

    def _over(self, inputs: int) -> Lora:
        """LoRA's own of the sums over groups, in place of their means times how many there are."""
        return replace(self.lora, scaling=self.lora.scaling * (inputs / self.group**2))


def check_group(value: object) -> None:
    """ConfigError for what is no number of inputs."""
    if type(value) is not int or not 1 <= value < 1 << 31:
        raise ConfigError(f"qalora_group_size is {quoted(value)}; a whole number of inputs, from 1, is wanted")
