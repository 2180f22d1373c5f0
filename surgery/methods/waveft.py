"""WaveFT: W + scaling * S, or its inverse wavelet transform, where S has c at random places.

https://arxiv.org/abs/2505.12532
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from surgery.core.arithmetic import exact_float64
from surgery.core.method import Dense, Params, Run
from surgery.core.op import Op, Tile
from surgery.core.select import pattern_value
from surgery.core.site import Site
from surgery.core.spec import Spec, Spelling
from surgery.errors import ConfigError, quoted
from surgery.methods.bias_config import BiasConfig
from surgery.methods.drawn_places import check_fields, check_room, one_of_each, place_bytes, places
from surgery.methods.scattered import Scattered
from surgery.methods.sparse import with_sparse
from surgery.methods.spreads import unit_of
from surgery.methods.wavelets import FILTERS, brought_back

Bias = Literal["none", "all", "waveft_only"]

_HELD = 15  # numbers for each that is brought back: values, places, and what sorts and sums them, as measured


@dataclass(frozen=True, kw_only=True)
class WaveFTConfig(BiasConfig):
    """WaveFT's settings, named as in PEFT: `n_frequency` numbers of a weight's wavelet transform are trained.

    Their places are drawn by `random_loc_seed`, the same as PEFT's, and stand in no file. `use_idwt=False` trains
    numbers of the weight itself. https://arxiv.org/abs/2505.12532

    >>> import surgery, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8))
    >>> _ = surgery.inject(model, WaveFTConfig(n_frequency=20, target_modules=["0"]))
    >>> model[0].waveft_spectrum["default"].shape, model(torch.ones(3, 16)).shape
    (torch.Size([20]), torch.Size([3, 8]))
    """

    peft_type: ClassVar[str] = "WAVEFT"
    bias_of_adapted = "waveft_only"
    spellings: ClassVar[Mapping[str, Spelling]] = {"waveft_spectrum": Spelling("c")}
    neutral: ClassVar[Mapping[str, Any]] = {"proportional_parameters": False}
    draws_places = True
    reasons: ClassVar[Mapping[str, str]] = {
        "proportional_parameters": "how many numbers a layer has would depend on all others; tell it by "
        "n_frequency_pattern, by full names"
    }

    n_frequency: int = 2592
    scaling: float = 25.0
    wavelet_family: str = "db1"
    use_idwt: bool = True
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False  # read and written for PEFT; the op decides, see hosts
    bias: Bias = "none"  # which biases of the base are trained
    n_frequency_pattern: Mapping[str, int] = field(default_factory=dict)
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self.n_frequency, self.scaling, self.random_loc_seed, self.n_frequency_pattern)
        if not isinstance(self.wavelet_family, str) or (self.use_idwt and self.wavelet_family not in FILTERS):
            raise ConfigError(
                f"wavelet_family is {quoted(self.wavelet_family)}; one of {', '.join(map(repr, FILTERS))} is wanted, "
                "whose filters have a closed form"
            )

    def method(self, name: str) -> "WaveFT":
        count = pattern_value(self.n_frequency_pattern, name, self.n_frequency)
        family = self.wavelet_family if self.use_idwt else None
        return WaveFT(float(self.scaling), count, family, self.random_loc_seed, self.init_weights)

    def told(self, name: str) -> Mapping[str, float]:
        return {"n_frequency": pattern_value(self.n_frequency_pattern, name, self.n_frequency)}


@dataclass(frozen=True)
class WaveFT(Scattered):
    """c is [count]."""

    count: int
    family: str | None = "db1"  # None: numbers of the weight itself
    seed: int = 777
    zero: bool = True  # does c begin as zeros?

    name = "WaveFT"

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        check_room(site, self.name, self.count)
        return {"c": Spec("waveft_spectrum", (self.count,))}

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:  # noqa: ARG002  # for others
        shape = self.tensors(site)["c"].shape
        return {"c": torch.zeros(shape) if self.zero else torch.randn(shape) * 0.01}

    def matrices(self, p: Params, site: Site) -> Params:
        """What comes to one place is summed in the order of c, by operations of its own."""
        v, rows, columns = self._acting(exact_float64(p["c"]), site.shape, inside=True)
        flat, group = torch.unique(rows * site.shape[1] + columns, return_inverse=True)
        summed = size = v.new_zeros(len(flat))
        for chosen in one_of_each(group):
            summed = summed.index_add(0, group[chosen], v[chosen])
            size = size.index_add(0, group[chosen], v[chosen].abs())
        at = {"rows": flat // site.shape[1], "columns": flat % site.shape[1]}
        return {**p, "v": summed, "size": size, **at, "frame": v.new_empty(*site.shape, 0)}

    def work_bytes(self, site: Site) -> int:
        each = 1 if self.family is None else len(FILTERS[self.family]) ** 2
        return place_bytes(site.shape) + 8 * _HELD * each * self.count

    def settings(self) -> Mapping[str, str]:
        return {**super().settings(), "seed": str(self.seed), "wavelet": self.family or "none"}

    def spread(self, p: Params, tile: Tile) -> Tensor:
        # PEFT rounds either filter's number, their product, that with each c, the sum of all that come to an element,
        # at most four of each two numbers along either axis, and what the scaling makes of it.
        roundings = 1 if self.family is None else len(FILTERS[self.family]) ** 2 + 5
        return unit_of(p["c"]) * roundings * abs(self.scaling) * self.numbers({**p, "v": p["size"]}, tile)

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:  # noqa: ARG002  # no dropout
        def acting(shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
            v, rows, columns = self._acting(p["c"], shape)
            return self.scaled(v), rows * shape[1] + columns

        return with_sparse(x, run, acting)

    def _acting(self, c: Tensor, shape: tuple[int, int], inside: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Values, and where in the matrix they act, each by itself; or those `inside`, whose number no shape tells."""
        at = places(c, self.seed, shape)
        if self.family is None:
            return c, at[0], at[1]
        rows, columns, weights = brought_back(at, shape, self.family)
        v = c.repeat(len(weights) // len(c)) * weights.to(c.dtype)
        if not inside:
            return v, rows, columns
        kept = weights != 0  # those outside would come to one place, thousands of them, each in a step of its own
        return v[kept], rows[kept], columns[kept]
