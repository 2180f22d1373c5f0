"""Token rows: rows of an embedding or an output head, replaced by trained ones.

PEFT's `trainable_token_indices`, beside LoRA, and its TRAINABLE_TOKENS, alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from surgery.core.arithmetic import require_finite
from surgery.core.as_peft import AsPeft
from surgery.core.method import Dense, Method, Params, Product, Run
from surgery.core.op import Op, Tile
from surgery.core.site import Site
from surgery.core.spec import Spec
from surgery.errors import ConfigError, MatchError, printable

_AXES = {"linear": 0, "embedding": 1}  # of the matrix [out, in], along which tokens lie


@dataclass(frozen=True)
class TokenRows(Method, AsPeft):
    """t is [tokens, width]: what stands in the rows of these tokens, whatever stood there."""

    tokens: tuple[int, ...]
    field: str = "trainable_token_indices"  # as its config calls them
    spelling: str = "token_adapter.trainable_tokens_delta"
    drawn: bool = False  # do they begin as normal numbers, not as what stands there?

    name = "trainable tokens"
    couples = frozenset()

    @property
    def replaced_rows(self) -> tuple[int, ...]:
        return self.tokens

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        axis = _AXES.get(site.acting.name)
        if axis is None or site.acting.roles:
            raise MatchError(
                f"{printable(site.name)}: its op is {site.acting.name}; {self.field} is of Embedding and "
                "Linear, which have a row for each token; name another module"
            )
        if max(self.tokens) >= site.shape[axis]:
            raise MatchError(
                f"{printable(site.name)}: {self.field} has {max(self.tokens)}, and it has rows for "
                f"{site.shape[axis]} tokens; resize the model first"
            )
        shape = len(self.tokens), site.shape[1 - axis]
        return {"t": Spec(self.spelling, shape, "trainable_tokens_delta")}

    def matrices(self, p: Params, site: Site) -> Params:
        axis = _AXES[site.acting.name]
        return {"t": p["t"].T if axis else p["t"], "axis": torch.tensor(axis)}

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:
        shape = self.tensors(site)["t"].shape  # where they cannot be, that is refused
        if self.drawn:
            return {"t": torch.randn(shape)}
        axis = _AXES[site.acting.name]
        found = base().weight.index_select(axis, torch.tensor(self.tokens, device=base().weight.device))
        held = torch.promote_types(found.dtype, torch.float32)  # in less they would not be what stands there
        return {"t": (found.T if axis else found).to(held).contiguous()}

    def merge(self, base: Dense, p: Params, tile: Tile, product: Product) -> Dense:  # noqa: ARG002  # no product in it
        axis, weight = int(p["axis"]), base.weight
        first = tile[axis].start or 0
        here = [at for at, token in enumerate(self.tokens) if 0 <= token - first < weight.shape[axis]]
        rows = p["t"].index_select(axis, torch.tensor(here, device=p["t"].device, dtype=torch.long))
        places = torch.tensor([self.tokens[at] - first for at in here], device=weight.device, dtype=torch.long)
        return base._replace(weight=weight.index_copy(axis, places, rows.to(weight.device, weight.dtype)))

    def steps(self, p: Params, tile: Tile, product: Product) -> None:  # noqa: ARG002  # what stood there is gone
        require_finite(p["t"], "t")

    def merge_as_peft(self, stored: Tensor, p: Params, site: Site, safe: bool) -> Tensor:  # noqa: ARG002  # one way
        places = torch.tensor(self.tokens, device=stored.device)
        return stored.index_copy(0, places, p["t"].to(stored.device, stored.dtype))

    def spread(self, p: Params, tile: Tile) -> Tensor:  # noqa: ARG002  # nothing is computed
        return torch.zeros(1, 1, dtype=torch.float64)

    def settings(self) -> Mapping[str, str]:
        return {"tokens": ",".join(map(str, self.tokens))}

    def weighted(self, weight: float) -> Self:
        if weight != 1:
            raise ConfigError(f"its weight is {weight}; {self.field} replaces rows; a weight of 1 is wanted")
        return self

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:  # noqa: ARG002  # as others'
        below, tokens, bias = run(x), torch.tensor(self.tokens, device=x.device), run.bias()
        if not _AXES[op.name]:
            logits = op.apply(x.to(p["t"].dtype), p["t"], None if bias is None else bias[tokens].to(p["t"].dtype))
            return below.index_copy(-1, tokens, logits.to(below.dtype))
        same = x.unsqueeze(-1) == tokens  # [*batch, tokens]
        found = op.apply(same.int().argmax(-1), p["t"].T, bias)  # [*batch, width]
        return torch.where(same.any(-1, keepdim=True), found.to(below.dtype), below)
