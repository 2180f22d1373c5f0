"""SHiRA: W + S, where S is zero but for a few numbers at random places. https://arxiv.org/abs/2406.13175"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from surgery.core.config import AdapterConfig
from surgery.core.method import Dense, Params, Run
from surgery.core.op import Op
from surgery.core.site import Site
from surgery.core.spec import Spec, Spelling
from surgery.errors import ConfigError, MatchError, ValueRangeError, printable, quoted
from surgery.methods.acts_on import only_linear
from surgery.methods.field_values import check_count, check_whole
from surgery.methods.scattered import Scattered
from surgery.methods.sparse import with_sparse

_OWN_MASK = "the places of its numbers come of code, mask_fn; make the adapter in PEFT, and load what it saves"


@dataclass(frozen=True, kw_only=True)
class ShiraConfig(AdapterConfig):
    """SHiRA's settings, named as in PEFT: r * (out + in) numbers of a weight [out, in] are trained, and no others.

    Their places are drawn by `random_seed`, the same as PEFT's; files hold them as indices [2, numbers]. Another
    `mask_type` than "random" stands for places that PEFT was given by code. https://arxiv.org/abs/2406.13175

    >>> import surgery, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8))
    >>> _ = surgery.inject(model, ShiraConfig(r=2, target_modules=["0"]))
    >>> model[0].shira_weight["default"].shape, model[0].shira_indices["default"].shape
    (torch.Size([48]), torch.Size([2, 48]))
    """

    peft_type: ClassVar[str] = "SHIRA"
    spellings: ClassVar[Mapping[str, Spelling]] = {
        "shira_weight": Spelling("v"),
        "shira_indices": Spelling("at", integers=True),
    }
    neutral: ClassVar[Mapping[str, Any]] = {}
    unwritten = frozenset({"exclude_modules", "layers_to_transform", "layers_pattern"})

    r: int = 32
    mask_type: str = "random"
    random_seed: int | None = None
    fan_in_fan_out: bool = False  # read and written for PEFT, which sets it to false over Linear
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("r", self.r)
        if not isinstance(self.mask_type, str):
            raise ConfigError(f"mask_type is {quoted(self.mask_type)}; it must be a string")
        if self.random_seed is not None:
            check_whole("random_seed", self.random_seed, 0, (1 << 64) - 1)

    def method(self, name: str) -> "Shira":  # noqa: ARG002  # the same everywhere
        return Shira(1.0, self.r, self.random_seed, self.init_weights)

    def told(self, name: str) -> Mapping[str, float]:  # noqa: ARG002  # as above
        return {"r": self.r}

    def check_given(self, value: object) -> None:
        drawn = getattr(value, "mask_fn", None)
        if self.mask_type == "random" and drawn is not None and getattr(drawn, "__name__", "") != "random_mask":
            raise ConfigError(f"mask_fn is {printable(drawn)}: {_OWN_MASK}")

    def check_fresh(self) -> None:
        if self.mask_type != "random":
            raise ConfigError(f"mask_type is {quoted(self.mask_type)}: {_OWN_MASK}")


@dataclass(frozen=True)
class Shira(Scattered):
    """v is [numbers], and `at` [2, numbers] their rows and columns."""

    r: int
    seed: int | None = None
    zero: bool = True  # does v begin as zeros?

    name = "SHiRA"

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        only_linear(site, self.name)
        out_features, in_features = site.shape
        count = self.r * (out_features + in_features)
        if count > out_features * in_features:
            raise MatchError(
                f"{printable(site.name)}: r is {self.r}, which is {count} numbers, and its weight has "
                f"{out_features * in_features}; choose a smaller r, or exclude it"
            )
        return {"v": Spec("shira_weight", (count,)), "at": Spec("shira_indices", (2, count), fixed=True)}

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:  # noqa: ARG002  # for others
        drawn = torch.Generator()  # without a seed always the same, as in PEFT
        if self.seed is not None:
            drawn.manual_seed(self.seed)
        out_features, in_features = site.shape
        (count,) = self.tensors(site)["v"].shape
        flat = torch.randperm(out_features * in_features, generator=drawn)[:count].sort().values
        at = torch.stack([flat // in_features, flat % in_features]).to(torch.int32)
        return {"v": torch.zeros(count) if self.zero else torch.randn(count), "at": at}

    def check_values(self, p: Params, site: Site, where: str) -> None:
        rows, columns = p["at"].to(torch.int64).unbind()
        (out_features, in_features), least = site.shape, min(int(rows.min()), int(columns.min()))
        flat = rows * in_features + columns
        if least < 0 or int(rows.max()) >= out_features or int(columns.max()) >= in_features:
            why = f"indices beyond a weight of {[out_features, in_features]}"
        elif len(torch.unique(flat)) < len(flat):
            why = "an index twice"
        else:
            return
        raise ValueRangeError(
            f"{printable(where)}: {printable(site.name)}: shira_indices holds {why}; each place once is wanted; save "
            "or download it again"
        )

    def matrices(self, p: Params, site: Site) -> Params:
        """The frame, [out, in, 0], has the weight's shape, and no numbers."""
        rows, columns = p["at"].to(torch.int64).unbind()
        return {"v": p["v"], "rows": rows, "columns": columns, "frame": p["v"].new_empty(*site.shape, 0)}

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:  # noqa: ARG002  # no dropout
        rows, columns = p["at"].to(torch.int64).unbind()
        return with_sparse(x, run, lambda shape: (self.scaled(p["v"]), rows * shape[1] + columns))
