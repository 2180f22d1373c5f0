"""LoKrConfig: LoKr's settings, named as in PEFT."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

from surgery.core.spec import Spelling
from surgery.errors import ConfigError, quoted
from surgery.methods.lokr import Init, LoKr
from surgery.methods.lycoris import Dropouts, LycorisConfig

_FIRST = ({"w1"}, {"w1_a", "w1_b"})
_SECOND = ({"w2"}, {"w2_a", "w2_b"}, {"w2_a", "w2_b", "t2"})
_ROLES = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")


@dataclass(frozen=True, kw_only=True)
class LoKrConfig(LycorisConfig):
    """LoKr's settings: W + alpha / r * w1 (x) w2, of w1 [l, m] and w2 [k, n] with out = l * k and in = m * n.

    w2 is w2_a w2_b, [k, r] and [r, n], where 2 * r is below k or n; with `decompose_both` so is w1 where 2 * r is below
    l or m. `decompose_factor` is how large l and m are to be. With `use_effective_conv2d` the w2 of a kernel of more
    than one place is in Tucker's form. https://arxiv.org/abs/2309.14859

    >>> LoKrConfig(r=4, alpha=2, target_modules=["q_proj"]).method("q_proj").scaling
    0.5
    """

    peft_type: ClassVar[str] = "LOKR"
    spellings: ClassVar[Mapping[str, Spelling]] = {f"lokr_{role}": Spelling(role) for role in _ROLES}

    decompose_both: bool = False
    decompose_factor: int = -1
    rank_dropout_scale: bool = False  # does what dropout leaves count for what is gone?
    init_weights: Init = True  # which factor begins as zeros: True the first, "lycoris" the second, False none

    def __post_init__(self) -> None:
        super().__post_init__()
        if type(self.decompose_factor) is not int:
            raise ConfigError(f"decompose_factor is {quoted(self.decompose_factor)}; it must be a whole number")
        if self.init_weights not in (True, False, "lycoris") or not isinstance(self.init_weights, bool | str):
            raise ConfigError(f"init_weights is {quoted(self.init_weights)}; it must be true, false or 'lycoris'")

    def forms(self) -> Collection[frozenset[str]]:
        return [frozenset(first | second) for first, second in product(_FIRST, _SECOND)]

    def method(self, name: str) -> LoKr:
        r, alpha = self.numbers(name)
        return LoKr(
            alpha / r,
            r,
            self.use_effective_conv2d,
            self.decompose_both,
            self.decompose_factor,
            Dropouts(self.rank_dropout, self.module_dropout, self.rank_dropout_scale),
            self.init_weights,
        )
