"""RoAd: R W, and R b of the bias, for R that turns and stretches pairs of outputs. https://arxiv.org/abs/2409.00119

In each group of outputs the first half is paired with the second: of a pair (u, v), u becomes c u - s v, and v becomes
c v + s u, for c = alpha cos(theta) and s = alpha sin(theta).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from surgery.core.angles import OFF, cos_sin
from surgery.core.arithmetic import all_finite, exact_float64, require_finite
from surgery.core.config import AdapterConfig
from surgery.core.method import AtStrength, Dense, Mixing, Params, Product, Run
from surgery.core.op import Op, Tile
from surgery.core.site import Site
from surgery.core.spec import Spec, Spelling
from surgery.errors import ConfigError, MatchError, StateError, printable
from surgery.methods.acts_on import only_linear
from surgery.methods.field_values import check_choice, check_count
from surgery.methods.spreads import unit_of

Variant = Literal["road_1", "road_2", "road_4"]
_NUMBERS: Mapping[str, int] = {"road_1": 1, "road_2": 2, "road_4": 4}  # for each pair, of either tensor


@dataclass(frozen=True, kw_only=True)
class RoadConfig(AdapterConfig):
    """RoAd's settings, named as in PEFT: outputs are turned and stretched by pairs within groups of `group_size`.

    Angles theta and sizes alpha are [out / 2] for `road_1`: one for each pair; [out] for `road_2`: one for each output;
    [2 out] for `road_4`: one for each product. https://arxiv.org/abs/2409.00119

    >>> import surgery, torch
    >>> model = torch.nn.ModuleDict({"up": torch.nn.Linear(4, 6)})
    >>> model = surgery.inject(model, RoadConfig(group_size=2, target_modules=["up"]))
    >>> list(model["up"].road_theta["default"].shape), list(model["up"].road_alpha["default"].shape)
    ([3], [3])
    """

    peft_type: ClassVar[str] = "ROAD"
    spellings: ClassVar[Mapping[str, Spelling]] = {"road_theta": Spelling("theta"), "road_alpha": Spelling("alpha")}
    neutral: ClassVar[Mapping[str, Any]] = {}
    unwritten = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})

    variant: Variant = "road_1"
    group_size: int = 64
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("variant", self.variant, tuple(_NUMBERS))
        check_count("group_size", self.group_size)
        if self.group_size % 2:
            raise ConfigError(f"group_size is {self.group_size}; an even number is wanted, of whole pairs")

    def method(self, name: str) -> "Road":  # noqa: ARG002  # the same everywhere
        return Road(self.variant, self.group_size, self.init_weights)


@dataclass(frozen=True)
class Road(AtStrength, Mixing):
    """theta and alpha are [numbers * out / 2]; at another strength than 1 it goes so much of the way from the base to
    the merge.
    """

    variant: Variant
    group: int
    still: bool = True  # does it begin without effect?

    name = "RoAd"

    @property
    def together(self) -> int:
        return self.group

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        only_linear(site, self.name)
        out_features = site.shape[0]
        if out_features % self.group:
            raise MatchError(
                f"{printable(site.name)}: group_size is {self.group}, of which its {out_features} outputs are no "
                "multiple; choose one that divides them, or exclude it"
            )
        shape = (out_features // 2 * _NUMBERS[self.variant],)
        return {"theta": Spec("road_theta", shape), "alpha": Spec("road_alpha", shape)}

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:  # noqa: ARG002  # for others
        shape = self.tensors(site)["theta"].shape
        if self.still:
            return {"theta": torch.zeros(shape), "alpha": torch.ones(shape)}
        return {"theta": torch.randn(shape) / 2, "alpha": 1 + torch.randn(shape) / 2}

    def prepared(self, p: Params, product: Product) -> Params:  # noqa: ARG002  # no product in it
        """With "c" and "s", [out]; and "size" [2, out], of alpha for each."""
        for role, values in p.items():
            require_finite(values, role)
        (cos, _), (_, sin), (a, b) = map(self._laid, (*cos_sin(p["theta"]), exact_float64(p["alpha"])))
        return {**p, "c": a * cos, "s": b * sin, "size": torch.stack([a, b]).abs()}

    def merge(self, base: Dense, p: Params, tile: Tile, product: Product) -> Dense:
        p, weight = p if "c" in p else self.prepared(p, product), base.weight
        first = tile[0].start or 0
        if first % self.group or len(weight) % self.group:
            raise StateError(f"rows from {first}, {len(weight)} of them, are no whole groups of {self.group}")
        if not all_finite(weight):  # it stays so, which those who read it refuse
            return base
        c, s = self._coefficients(p, tile)
        turned = self._turned(weight.to(c.dtype), c.unsqueeze(1), s.unsqueeze(1), 0)
        if base.bias is None:
            return Dense(turned)
        return Dense(turned, self._turned(base.bias.to(c.dtype), c, s, 0))

    def for_bias(self) -> Self:
        return self

    def strayed(self, base: Tensor, error: Tensor, p: Params, tile: Tile) -> Tensor:
        # A cosine or sine is off by two units, and ours by `OFF`, and is rounded once more by its size; so are both
        # products and their sum.
        unit, (c, s) = unit_of(p["theta"], p["alpha"]), self._coefficients(p, tile)
        off = abs(self.strength) * (3 * unit + OFF) * p["size"][:, tile[0]].unsqueeze(2)  # [2, out, 1]
        c, s = c.abs().unsqueeze(1), s.abs().unsqueeze(1)
        base, error = base.abs(), error.abs()
        turned = c * error + s * self._other(error, 0)
        own = (off[0] + 2 * unit * c) * base + (off[1] + 2 * unit * s) * self._other(base, 0)
        return turned + own

    def held_off(self, base: Tensor, p: Params, tile: Tile, dtype: torch.dtype) -> Tensor:
        # PEFT rounds R to the weight's dtype.
        c, s = (one.abs().unsqueeze(1) for one in self._coefficients(p, tile))
        return torch.finfo(dtype).eps / 2 * (c * base.abs() + s * self._other(base.abs(), 0))

    def settings(self) -> Mapping[str, str]:
        return {"variant": self.variant, "group_size": str(self.group), **super().settings()}

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:  # noqa: ARG002  # no dropout
        below = run(x)
        theta, alpha = (p[role].to(torch.promote_types(p[role].dtype, torch.float32)) for role in ("theta", "alpha"))
        (cos, _), (_, sin), (a, b) = map(self._laid, (theta.cos(), theta.sin(), alpha))
        c, s = self._part_of_the_way(a * cos, b * sin)
        wide = below.to(torch.promote_types(below.dtype, c.dtype))
        return self._turned(wide, c, s, wide.dim() - 1).to(below.dtype)

    def _laid(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Those for c and for s, [out] each."""
        half = self.group // 2
        if self.variant == "road_1":
            numbers = numbers.view(-1, 1, half).expand(-1, 2, half).flatten()
        if self.variant != "road_4":
            return numbers, numbers
        first, second = numbers.view(-1, 2, self.group).unbind(1)
        return first.flatten(), second.flatten()

    def _coefficients(self, p: Params, tile: Tile) -> tuple[Tensor, Tensor]:
        return self._part_of_the_way(p["c"][tile[0]], p["s"][tile[0]])

    def _part_of_the_way(self, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        return (c, s) if self.strength == 1 else (1 + self.strength * (c - 1), self.strength * s)

    def _turned(self, values: Tensor, c: Tensor, s: Tensor, axis: int) -> Tensor:
        """c values + s * the other of each pair, which for the first of both is taken from it."""
        cut = (*values.shape[:axis], -1, 2, self.group // 2, *values.shape[axis + 1 :])
        u, v = values.reshape(cut).unbind(axis + 1)
        return values * c + torch.stack([-v, u], axis + 1).view(values.shape) * s

    def _other(self, values: Tensor, axis: int) -> Tensor:
        """The other of each pair."""
        cut = (*values.shape[:axis], -1, 2, self.group // 2, *values.shape[axis + 1 :])
        return values.reshape(cut).flip(axis + 1).view(values.shape)
