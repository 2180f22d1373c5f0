"""(IA)^3: W * l, a factor for each output (of the bias too) or for each input. https://arxiv.org/abs/2205.05638"""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from surgery.core.as_peft import AsPeft
from surgery.core.config import AdapterConfig
from surgery.core.elementwise import Scale
from surgery.core.field_checks import check_names, check_pattern
from surgery.core.method import AtStrength, Dense, Params, Product, Run
from surgery.core.names import Endings
from surgery.core.op import Op, Tile
from surgery.core.patterns import Budget
from surgery.core.site import Site
from surgery.core.spec import Spec, Spelling
from surgery.errors import ConfigError, MatchError, printable


@dataclass(frozen=True, kw_only=True)
class IA3Config(AdapterConfig):
    """(IA)^3's settings, named as in PEFT: `feedforward_modules` has its inputs scaled, all else its outputs.

    It lists ends of names, globs and expressions after `re:`, or is one pattern; [] where there are none. Each module
    has a factor for each of its inputs, or of its outputs. https://arxiv.org/abs/2205.05638

    >>> config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    >>> [config.method(name).feedforward for name in ("0.k_proj", "0.down_proj")]
    [False, True]
    """

    peft_type: ClassVar[str] = "IA3"
    spellings: ClassVar[Mapping[str, Spelling]] = {"ia3_l": Spelling("l")}
    neutral: ClassVar[Mapping[str, Any]] = {}
    by_ends = frozenset({"feedforward_modules"})
    unwritten = frozenset({"layers_to_transform", "layers_pattern"})

    feedforward_modules: str | Sequence[str] | None = None
    fan_in_fan_out: bool = False  # read and written for PEFT; the op decides, see hosts
    init_ia3_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names("feedforward_modules", self.feedforward_modules, or_pattern=True)
        if isinstance(self.feedforward_modules, str):
            check_pattern("feedforward_modules", self.feedforward_modules)

    def method(self, name: str) -> "Ia3":
        return Ia3(feedforward=self._is_feedforward(name), ones=self.init_ia3_weights)

    def unused(self, names: Collection[str]) -> Mapping[str, Sequence[str]]:
        entries = self.feedforward_modules
        if isinstance(entries, str):
            missed = [] if any(map(self._is_feedforward, names)) else [entries]
        else:
            missed = [one for one in entries or () if one not in names and not any(n.endswith(one) for n in names)]
        return {"feedforward_modules": missed}

    def named(self, names: Sequence[str]) -> Self:
        chosen = [name for name in names if self._is_feedforward(name)]
        told = replace(super().named(names), feedforward_modules=chosen)
        if [name for name in names if told._is_feedforward(name)] == chosen:
            return told
        return replace(told, feedforward_modules="|".join(map(re.escape, chosen)))  # one name ends another

    def _is_feedforward(self, name: str) -> bool:
        """PEFT's rule: a pattern means all of a name; a list means ends of names, and not only after a dot."""
        entries = self.feedforward_modules
        if entries is None:
            raise ConfigError("feedforward_modules is not given; a list of module names is wanted, [] if none is")
        if isinstance(entries, str):
            return self._budget.fullmatch(entries, name) is not None
        return self._endings.end(name)

    @cached_property
    def _budget(self) -> Budget:
        return Budget()

    @cached_property
    def _endings(self) -> Endings:
        return Endings(self.feedforward_modules or ())


@dataclass(frozen=True)
class Ia3(AtStrength, AsPeft):
    """l is [1, in] where it scales the input (`feedforward`), else [out, 1]; [1, channels, 1, ...] of a convolution.

    At another strength the factor is 1 + strength * (l - 1): so much of the way from the base to the merge.
    """

    feedforward: bool
    ones: bool = True

    name = "IA3"
    couples = frozenset()

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        if site.acting.roles or not site.acting.accepts_dropout():  # it has no input, or none that could be scaled
            raise MatchError(
                f"{printable(site.name)}: an {site.acting.name}; (IA)^3 acts on Linear, Conv1D and convolutions, "
                "as in PEFT; exclude it"
            )
        op, (out_features, in_features) = site.acting, site.shape
        if len(op.kernel) == 1:
            raise MatchError(
                f"{printable(site.name)}: a Conv1d; of convolutions (IA)^3 acts on Conv2d and Conv3d, as in PEFT; "
                "exclude it"
            )
        scaled = op.channels(in_features) if self.feedforward else out_features
        if op.kernel:
            return {"l": Spec("ia3_l", (1, scaled, *(1,) * len(op.kernel)))}
        return {"l": Spec("ia3_l", (1, scaled) if self.feedforward else (scaled, 1))}

    def matrices(self, p: Params, site: Site) -> Params:
        """l as [out, 1], or laid over the inputs."""
        if not self.feedforward:
            return {"l": p["l"].reshape(-1, 1)}
        return {"l": site.acting.for_inputs(p["l"].flatten(), site.shape)}

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:  # noqa: ARG002  # for others
        return {
            role: (torch.ones if self.ones else torch.randn)(spec.shape) for role, spec in self.tensors(site).items()
        }

    def merge(self, base: Dense, p: Params, tile: Tile, product: Product) -> Dense:
        factor = self.steps(p, tile, product).values
        if base.bias is None or self.feedforward:
            return base._replace(weight=base.weight * factor)
        return Dense(base.weight * factor, base.bias * factor.flatten())

    def steps(self, p: Params, tile: Tile, product: Product) -> Scale:
        return Scale(self._factor({"l": product.held(p["l"], "l")}, tile))

    def merge_as_peft(self, stored: Tensor, p: Params, site: Site, safe: bool) -> Tensor:  # noqa: ARG002  # one way
        return (stored * site.acting.stored(self.matrices(p, site)["l"])).to(stored.dtype)

    def beyond_peft(self) -> str:
        return "" if self.strength == 1 else "(IA)^3 at another weight than 1"

    def for_bias(self) -> "Ia3 | None":
        return None if self.feedforward else self

    def spread(self, p: Params, tile: Tile) -> Tensor:
        return torch.zeros_like(self._factor(p, tile), dtype=torch.float64)  # one product, rounded with the outcome

    def settings(self) -> Mapping[str, str]:
        return {"scales": "input" if self.feedforward else "output", **super().settings()}

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:  # noqa: ARG002  # as others'
        factor = self._strong(p["l"])
        # [1, channels, 1, ...] of a convolution, whose input may have no batch; else one number for each feature
        factor = factor.squeeze(0) if factor.dim() > 2 else factor.flatten()
        return run((x * factor).to(x.dtype)) if self.feedforward else run(x) * factor

    def _factor(self, p: Params, tile: Tile) -> Tensor:
        """Of the tile, [out, 1], [1, in] or [out, in]."""
        rows, columns = tile
        factor = p["l"] if p["l"].shape[0] == 1 else p["l"][rows]
        return self._strong(factor[:, columns] if self.feedforward else factor)

    def _strong(self, factor: Tensor) -> Tensor:
        return factor if self.strength == 1 else 1 + self.strength * (factor - 1)
