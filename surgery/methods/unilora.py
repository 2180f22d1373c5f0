"""Uni-LoRA: W + B A, whose numbers are those of one vector for all sites, each taken and scaled by a fixed place.

https://arxiv.org/abs/2506.00799
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from surgery.core.arithmetic import exact_float64, factor_bytes
from surgery.core.method import Additive, Dense, Params, Product, Run
from surgery.core.op import Factors, Op, Tile
from surgery.core.site import Site
from surgery.core.spec import Spec, Spelling
from surgery.errors import ConfigError, ValueRangeError, printable
from surgery.methods.acts_on import only_linear_or_conv1d
from surgery.methods.bias_config import BiasConfig
from surgery.methods.factored import factored
from surgery.methods.field_values import check_count, check_dropout, check_number, check_whole
from surgery.methods.spreads import product_spread, unit_of


@dataclass(frozen=True, kw_only=True)
class UniLoraConfig(BiasConfig):
    """Uni-LoRA's settings, named as in PEFT: A [r, in] and B [out, r], made of `theta_d_length` numbers in all.

    Which number stands where is drawn from `proj_seed` for all modules together, so that each stands equally often,
    and divided by the root of how often that is. Files hold the numbers alone, or with `save_indices` their places
    and scales too, without which they are for models in memory: a checkpoint does not tell the order of its modules.
    A fresh adapter changes the outputs, as in PEFT. https://arxiv.org/abs/2506.00799

    >>> import surgery, torch
    >>> model = torch.nn.ModuleDict({"up": torch.nn.Linear(4, 6), "down": torch.nn.Linear(6, 3)})
    >>> model = surgery.inject(model, UniLoraConfig(r=2, theta_d_length=8, target_modules=["up", "down"]))
    >>> [list(model["up"].unilora_indices_A["default"].shape), list(model["up"].unilora_indices_B["default"].shape)]
    [[2, 4], [6, 2]]
    >>> model["up"].unilora_theta_d["default"] is model["down"].unilora_theta_d["default"]
    True
    """

    peft_type: ClassVar[str] = "UNILORA"
    bias_of_adapted = "unilora_only"
    spellings: ClassVar[Mapping[str, Spelling]] = {
        **{f"unilora_indices_{one}": Spelling(f"at_{one}", integers=True) for one in "AB"},
        **{f"unilora_scales_{one}": Spelling(f"scale_{one}") for one in "AB"},
    }
    shared: ClassVar[Mapping[str, str]] = {"unilora_theta_d": "theta"}
    deals: ClassVar[bool] = True
    neutral: ClassVar[Mapping[str, Any]] = {}
    unwritten: ClassVar[frozenset[str]] = frozenset({"exclude_modules"})

    r: int = 4
    proj_seed: int = 42
    theta_d_length: int = 256
    unilora_dropout: float = 0.0
    fan_in_fan_out: bool = False  # read and written for PEFT; the op decides, see hosts
    init_theta_d_bound: float = 0.02
    init_weights: bool = True
    save_indices: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("r", self.r)
        check_count("theta_d_length", self.theta_d_length)
        check_whole("proj_seed", self.proj_seed, 0, (1 << 64) - 1)
        check_number("init_theta_d_bound", self.init_theta_d_bound)
        if self.init_theta_d_bound <= 0:
            raise ConfigError(f"init_theta_d_bound is {self.init_theta_d_bound}; a number above 0 is wanted")
        check_dropout("unilora_dropout", self.unilora_dropout)

    def method(self, name: str) -> "UniLora":  # noqa: ARG002  # the same at all sites
        return UniLora(1.0, self.r, self.theta_d_length, self.proj_seed, self.unilora_dropout)

    def told(self, name: str) -> Mapping[str, float]:  # noqa: ARG002  # as above
        return {"r": self.r}

    def drawn(self, sites: Collection[Site]) -> Mapping[str, Tensor]:  # noqa: ARG002  # the same for any
        theta, bound = torch.empty(self.theta_d_length), float(self.init_theta_d_bound)
        return {"theta": theta.uniform_(-bound, bound) if self.init_weights else theta.normal_()}

    def dealt(self, sites: Mapping[str, Site]) -> Mapping[str, Params]:
        return _dealt(sites, self.r, self.theta_d_length, self.proj_seed)

    def keeps_dealt(self) -> bool:
        return self.save_indices

    def endings(self) -> Mapping[str, Spelling]:
        return self.spellings if self.save_indices else {}

    def written(self, sites: Mapping[str, Params]) -> tuple["UniLoraConfig", Mapping[str, Params]]:
        """Indices as PEFT writes them, where they are to be saved."""
        if not self.save_indices:
            return self, {name: {} for name in sites}
        wide = {
            name: {role: v if v.is_floating_point() else v.long() for role, v in p.items()} for name, p in sites.items()
        }
        return self, wide


@dataclass(frozen=True)
class UniLora(Additive):
    """`theta` is [length]; `at_A` and `scale_A` are [r, in], `at_B` and `scale_B` [out, r]."""

    r: int
    length: int
    seed: int
    dropout: float = 0.0

    name = "Uni-LoRA"

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        only_linear_or_conv1d(site, self.name)
        out_features, in_features = site.shape
        of_A, of_B = (self.r, in_features), (out_features, self.r)
        return {
            "at_A": Spec("unilora_indices_A", of_A, fixed=True),
            "at_B": Spec("unilora_indices_B", of_B, fixed=True),
            "scale_A": Spec("unilora_scales_A", of_A, fixed=True),
            "scale_B": Spec("unilora_scales_B", of_B, fixed=True),
            "theta": Spec("unilora_theta_d", (self.length,), shared=True),
        }

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:  # noqa: ARG002  # for others
        """As of an adapter over this site alone."""
        self.tensors(site)
        return _dealt({site.name: site}, self.r, self.length, self.seed)[site.name]

    def check_values(self, p: Params, site: Site, where: str) -> None:
        for role in ("at_A", "at_B"):
            if int(p[role].min()) < 0 or int(p[role].max()) >= self.length:
                raise ValueRangeError(
                    f"{printable(where)}: {printable(site.name)}: unilora_indices_{role[-1]} holds indices beyond a "
                    f"vector of {self.length} numbers; those of its numbers are wanted; save or download it again"
                )

    def matrices(self, p: Params, site: Site) -> Params:  # noqa: ARG002  # the tensors tell
        wide = {role: exact_float64(values) if values.is_floating_point() else values for role, values in p.items()}
        # In float64 each product is exact, where its factors have 24 bits or fewer.
        return {**p, **{side: _taken(wide, side) for side in "AB"}}

    def work_bytes(self, site: Site) -> int:
        return 2 * factor_bytes(site.shape, self.r)

    def delta(self, p: Params, tile: Tile, product: Product) -> Tensor:
        return product(p["B"], p["A"], tile, self.scaling)

    def directions(self, p: Params) -> Tensor:
        return p["A"]

    def spread(self, p: Params, tile: Tile) -> Tensor:
        # As LoRA's, with two more operations rounded: one product for each factor.
        unit = unit_of(p["theta"], p["scale_A"], p["scale_B"])
        return abs(self.scaling) * product_spread(p["B"][tile[0]], p["A"][:, tile[1]], unit, 2)

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:
        p = {**p, "theta": p["theta"].to(x.device)}  # of layers on several devices
        factors = Factors(_taken(p, "A"), _taken(p, "B"), self.scaling)
        return factored(x, run, op, factors, self.dropout if training else 0.0)


def _taken(p: Params, side: str) -> Tensor:
    at = p[f"at_{side}"]
    return p["theta"].index_select(0, at.flatten()).view(at.shape) * p[f"scale_{side}"]


def _dealt(sites: Mapping[str, Site], r: int, length: int, seed: int) -> dict[str, Params]:
    """By site its places and scales, as PEFT deals them in the order of the sites: A, then B."""
    halves = {name: ((r, site.shape[1]), (site.shape[0], r)) for name, site in sites.items()}
    sizes = [rows * columns for pair in halves.values() for rows, columns in pair]
    places = _places(sum(sizes), length, seed)
    counts = torch.bincount(places, minlength=length)
    scales = torch.where(counts > 0, counts.float().rsqrt(), 0.0)
    parts = iter(torch.split(places, sizes))
    found: dict[str, Params] = {}
    for name, pair in halves.items():
        A, B = (next(parts).view(shape) for shape in pair)
        at = {"at_A": A.to(torch.int32), "at_B": B.to(torch.int32)}
        held = _through(scales, sites[name].weight.torch_dtype)
        found[name] = {**at, "scale_A": held[A], "scale_B": held[B]}
    return found


def _through(scales: Tensor, dtype: torch.dtype) -> Tensor:
    """As PEFT holds them: rounded to the dtype of the weight that they lie over, in float32."""
    return scales.to(dtype).to(scales.dtype) if dtype.is_floating_point else scales


def _places(count: int, length: int, seed: int) -> Tensor:
    """[count]: each of `length` numbers equally often, but for one more of some; by PEFT's calls of numpy."""
    generator = np.random.default_rng(seed)
    each, left = divmod(count, length)
    found = np.repeat(np.arange(length), each)
    if left:
        found = np.concatenate([found, generator.choice(length, size=left, replace=False)])
    generator.shuffle(found)
    return torch.from_numpy(found)
