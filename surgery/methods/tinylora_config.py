"""TinyLoraConfig: TinyLoRA's settings, which of its vectors each module has, and how files tell that."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from surgery.core.adapter import shape_of
from surgery.core.method import Params
from surgery.core.site import Site
from surgery.core.spec import Spelling
from surgery.errors import ConfigError, quoted
from surgery.methods.bias_config import BiasConfig
from surgery.methods.field_values import (
    check_between,
    check_count,
    check_dropout,
    check_number,
    check_whole,
)
from surgery.methods.tinylora import TinyLora, projections, rank_of

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, kw_only=True)
class TinyLoraConfig(BiasConfig):
    """TinyLoRA's settings, named as in PEFT: W + U (v[0] P[0] + v[1] P[1] + ...) V, of which v [u] alone is trained.

    U [out, r] and V [r, in] are the largest parts of the weight as it began, and P [u, r, r] is drawn from
    `projection_seed` and the module's place among all. With `weight_tying` modules next to each other share one v: at
    1 all do. https://arxiv.org/abs/2602.04118

    >>> import surgery, torch
    >>> model = torch.nn.ModuleDict({"up": torch.nn.Linear(4, 6), "down": torch.nn.Linear(6, 3)})
    >>> model = surgery.inject(model, TinyLoraConfig(u=5, target_modules=["up", "down"]))
    >>> [list(model["up"].tinylora_A["default"].shape), list(model["up"].tinylora_P["default"].shape)]
    [[2, 4], [5, 2, 2]]
    >>> list(model["up"].tinylora_v["default"].shape)  # one vector for each of two modules
    [2, 5]
    """

    peft_type: ClassVar[str] = "TINYLORA"
    bias_of_adapted = "tinylora_only"
    spellings: ClassVar[Mapping[str, Spelling]] = {
        "tinylora_A": Spelling("V"),
        "tinylora_B": Spelling("U"),
        "tinylora_P": Spelling("P"),
        "tinylora_group": Spelling("group", integers=True),  # in undo records alone
    }
    shared: ClassVar[Mapping[str, str]] = {"tinylora_v": "v"}
    deals: ClassVar[bool] = True
    shared_in_parts: ClassVar[bool] = True
    neutral: ClassVar[Mapping[str, Any]] = {}
    unwritten: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})

    r: int = 2
    u: int = 64
    weight_tying: float = 0.0
    projection_seed: int = 42
    save_projection: bool = True
    init_v_bound: float = 0.02
    tinylora_dropout: float = 0.0
    fan_in_fan_out: bool = False  # read and written for PEFT; the op decides, see hosts
    init_weights: bool | str = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("r", self.r)
        check_count("u", self.u)
        check_between("weight_tying", self.weight_tying, 0, 1)
        check_whole("projection_seed", self.projection_seed, 0, (1 << 63) - 1)
        check_number("init_v_bound", self.init_v_bound)
        check_dropout("tinylora_dropout", self.tinylora_dropout)
        if not isinstance(self.init_weights, bool) and self.init_weights != "uniform":
            raise ConfigError(f"init_weights is {quoted(self.init_weights)}; true, false or 'uniform' is wanted")

    def check_fresh(self) -> None:
        if self.init_weights is False:
            raise ConfigError(
                "init_weights is false, by which v begins as whatever lies in memory; start with True or 'uniform'"
            )

    def method(self, name: str) -> TinyLora:  # noqa: ARG002  # the same at all sites
        return TinyLora(1.0, self.r, self.u, self.projection_seed, self.tinylora_dropout)

    def told(self, name: str) -> Mapping[str, float]:  # noqa: ARG002  # as above
        return {"r": self.r}

    def keeping_shared(self) -> Self:
        return replace(self, save_projection=True)

    def drawn(self, sites: Collection[Site]) -> Mapping[str, Tensor]:
        v, bound = torch.zeros(self.shared_rows(len(sites)), self.u), float(self.init_v_bound)
        return {"v": v.uniform_(-bound, bound) if self.init_weights == "uniform" else v}

    def dealt(self, sites: Mapping[str, Site]) -> Mapping[str, Params]:
        groups = self.shared_rows(len(sites))
        size, found = max(1, len(sites) // groups), dict[str, Params]()
        for place, (name, site) in enumerate(sites.items()):
            P = projections(self.u, rank_of(site, self.r), self.projection_seed + place, site.weight.torch_dtype)
            found[name] = {"P": P, "group": torch.tensor([min(place // size, groups - 1)], dtype=torch.int32)}
        return found

    def keeps_dealt(self) -> bool:
        return self.save_projection

    def shared_rows(self, sites: int) -> int:
        """How many vectors there are, of so many sites: PEFT's rounding, to even at a half."""
        return max(1, round(sites * (1.0 - self.weight_tying)))

    def order_of(self, sites: Mapping[str, Params]) -> Sequence[str] | None:
        """By P, which is drawn for each place."""
        places: dict[int, str] = {}
        for name, p in sites.items():
            if "P" not in p:
                return None
            P, (u, r, _) = p["P"], shape_of(p, "P")
            place = next((at for at in range(len(sites)) if self._is_drawn(P, u, r, at)), None)
            if place is None:
                return None
            places[place] = name
        return [places[place] for place in sorted(places)] if len(places) == len(sites) else None

    def _is_drawn(self, P: Tensor, u: int, r: int, place: int) -> bool:
        """Is it that of this place, over a base of whatever dtype?"""
        seed = self.projection_seed + place
        return any(torch.equal(projections(u, r, seed, dtype).to(P.dtype), P) for dtype in _DTYPES)

    def endings(self) -> Mapping[str, Spelling]:
        left_out = () if self.save_projection else ("P",)
        return {ending: one for ending, one in self.spellings.items() if one.role not in left_out}

    def forms(self) -> Collection[frozenset[str]]:
        roles = frozenset(one.role for one in self.endings().values())
        return [roles - {"group"}, roles]

    def written(self, sites: Mapping[str, Params]) -> tuple[Self, Mapping[str, Params]]:
        """As PEFT has them, whose models tell the groups."""
        kept = {one.role for one in self.endings().values()} - {"group"}
        return self, {name: {role: v for role, v in p.items() if role in kept} for name, p in sites.items()}
