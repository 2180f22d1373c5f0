"""VBLoRAConfig: VB-LoRA's settings, and which of two forms its files have."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from surgery.core.method import Params
from surgery.core.site import Site
from surgery.core.spec import Spelling
from surgery.errors import ConfigError
from surgery.methods.bias_config import BiasConfig
from surgery.methods.field_values import check_count, check_dropout, check_number
from surgery.methods.vblora import Banked, VBLoRA, VBLoRAOfTopK, of_top_k

_LOGITS = frozenset({"logits_A", "logits_B"})
_TOP_K = frozenset({"at_A", "part_A", "at_B", "part_B"})


@dataclass(frozen=True, kw_only=True)
class VBLoRAConfig(BiasConfig):
    """VB-LoRA's settings, named as in PEFT: W + B A, whose parts of `vector_length` numbers are mixed from one bank.

    The bank is [num_vectors, vector_length], and the layers' alone are logits: [r, in / vector_length, num_vectors] of
    A and [out / vector_length, r, num_vectors] of B. Each part is the sum of the vectors with the `topk` largest
    logits, by the softmax of these. With `save_only_topk_weights` files hold no more than those places and parts,
    which are merged and run, and not trained. A fresh adapter changes the outputs, as in PEFT.
    https://arxiv.org/abs/2405.15179

    >>> import surgery, torch
    >>> model = torch.nn.ModuleDict({"up": torch.nn.Linear(4, 6), "down": torch.nn.Linear(6, 2)})
    >>> config = VBLoRAConfig(r=3, num_vectors=8, vector_length=2, target_modules=["up", "down"])
    >>> model = surgery.inject(model, config)
    >>> [list(model["up"].vblora_logits_A["default"].shape), list(model["up"].vblora_logits_B["default"].shape)]
    [[3, 2, 8], [3, 3, 8]]
    >>> model["up"].vblora_vector_bank["default"] is model["down"].vblora_vector_bank["default"]
    True
    """

    peft_type: ClassVar[str] = "VBLORA"
    bias_of_adapted = "vblora_only"
    spellings: ClassVar[Mapping[str, Spelling]] = {
        **{f"vblora_logits_{one}": Spelling(f"logits_{one}") for one in "AB"},
        **{f"vblora_logits_{one}_topk_indices": Spelling(f"at_{one}", integers=True) for one in "AB"},
        **{f"vblora_logits_{one}_topk_weights": Spelling(f"part_{one}") for one in "AB"},
    }
    shared: ClassVar[Mapping[str, str]] = {"vblora_vector_bank": "vectors"}
    neutral: ClassVar[Mapping[str, Any]] = {}

    r: int = 4
    num_vectors: int = 256
    vector_length: int = 256
    topk: int = 2
    save_only_topk_weights: bool = False
    vblora_dropout: float = 0.0
    fan_in_fan_out: bool = False  # read and written for PEFT; the op decides, see hosts
    init_vector_bank_bound: float = 0.02
    init_logits_std: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("r", "num_vectors", "vector_length", "topk"):
            check_count(name, getattr(self, name))
        for name in ("init_vector_bank_bound", "init_logits_std"):
            check_number(name, getattr(self, name))
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}; a number from 0 is wanted")
        if self.topk > self.num_vectors:
            raise ConfigError(f"topk is {self.topk}, and num_vectors {self.num_vectors}; choose no more than there are")
        check_dropout("vblora_dropout", self.vblora_dropout)

    def method(self, name: str) -> Banked:  # noqa: ARG002  # the same at all sites
        return VBLoRA(**self._settings(), std=float(self.init_logits_std))

    def _settings(self) -> dict[str, Any]:
        own = {name: getattr(self, name) for name in ("r", "topk", "num_vectors", "vector_length")}
        return {"scaling": 1.0, "dropout": self.vblora_dropout, **own}

    def told(self, name: str) -> Mapping[str, float]:  # noqa: ARG002  # as above
        return {"r": self.r}

    def drawn(self, sites: Collection[Site]) -> Mapping[str, Tensor]:  # noqa: ARG002  # the same for any
        bound = float(self.init_vector_bank_bound)
        return {"vectors": torch.empty(self.num_vectors, self.vector_length).uniform_(-bound, bound)}

    def endings(self) -> Mapping[str, Spelling]:
        roles = frozenset[str]().union(*self.forms())
        return {ending: one for ending, one in self.spellings.items() if one.role in roles}

    def forms(self) -> Collection[frozenset[str]]:
        return [_LOGITS, _TOP_K] if self.save_only_topk_weights else [_LOGITS]

    def as_shaped(self, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> Self:
        """That of a file without logits says so of its method."""
        if not all(roles.keys() == _TOP_K for roles in shapes.values()):
            return self
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        return _OfTopK(**own)  # type: ignore[return-value]  # a VBLoRAConfig, of which no other is made

    def written(self, sites: Mapping[str, Params]) -> tuple[Self, Mapping[str, Params]]:
        """What the logits come to, where no more is to be saved."""
        if not self.save_only_topk_weights:
            return self, sites
        return self, {name: self._top_k(p) for name, p in sites.items()}

    def _top_k(self, p: Params) -> Params:
        """Indices in the smallest dtype that PEFT would take."""
        held = dict(p) if p.keys() == _TOP_K else of_top_k(p, self.topk)
        kinds = {1 << 8: torch.uint8, 1 << 15: torch.int16, 1 << 31: torch.int32}
        dtype = next(dtype for limit, dtype in kinds.items() if self.num_vectors < limit)
        return {role: values.to(dtype) if role.startswith("at_") else values for role, values in held.items()}


@dataclass(frozen=True, kw_only=True)
class _OfTopK(VBLoRAConfig):
    """That of an adapter whose logits are gone."""

    def method(self, name: str) -> Banked:  # noqa: ARG002  # the same at all sites
        return VBLoRAOfTopK(**self._settings())

    def check_trained(self) -> None:
        raise ConfigError(
            "save_only_topk_weights is true: the file has no logits, so that it is merged and run, and not trained, as "
            "in PEFT; load it without trainable=True, or train one whose config says false"
        )
