"""OFTConfig: OFT's settings, named as in PEFT."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from surgery.core.spec import Spelling
from surgery.errors import ConfigError, FormatError, printable
from surgery.methods.bias_config import BiasConfig
from surgery.methods.field_values import check_between, check_count, check_dropout
from surgery.methods.oft import Oft

Bias = Literal["none", "all", "oft_only"]
_RETRAIN = "PEFT asks to train it again, or to run it by the version that made it"
_SERIES_SINCE = (0, 18)  # of PEFT, whose earlier versions doubled the last power too


@dataclass(frozen=True, kw_only=True)
class OFTConfig(BiasConfig):
    """OFT's settings, named as in PEFT: blocks of `oft_block_size` inputs of a layer are rotated, or `r` blocks.

    One of the two is 0. Where it does not divide the inputs, what is nearest to it and does is taken. A block of b has
    b (b - 1) / 2 numbers, [blocks, b (b - 1) / 2] in all, or [1, b (b - 1) / 2] with `block_share`. `coft` keeps each
    block's numbers in a ball of `eps`. `module_dropout` leaves out so many of the blocks in training.
    https://arxiv.org/abs/2306.07280

    >>> config = OFTConfig(oft_block_size=8, target_modules=["q_proj"])
    >>> config.method("q_proj").block(20)
    10
    """

    peft_type: ClassVar[str] = "OFT"
    bias_of_adapted = "oft_only"
    spellings: ClassVar[Mapping[str, Spelling]] = {
        "oft_R.weight": Spelling("R"),
        "oft_embedding_R.weight": Spelling("R", "embedding"),
    }
    neutral: ClassVar[Mapping[str, Any]] = {}

    r: int = 0
    oft_block_size: int = 32
    module_dropout: float = 0.0
    fan_in_fan_out: bool = False  # read and written for PEFT, which turns it off
    bias: Bias = "none"  # which biases of the base are trained
    init_weights: bool = True
    coft: bool = False
    eps: float = 6e-5
    block_share: bool = False
    use_cayley_neumann: bool = True
    num_cayley_neumann_terms: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("r", self.r, 0)
        check_count("oft_block_size", self.oft_block_size, 0)
        if (self.r == 0) == (self.oft_block_size == 0):
            raise ConfigError(
                f"r is {self.r} and oft_block_size is {self.oft_block_size}; just one of them must be 0, as it follows "
                "from the other"
            )
        check_count("num_cayley_neumann_terms", self.num_cayley_neumann_terms)
        check_dropout("module_dropout", self.module_dropout)
        check_between("eps", self.eps, 0, 1e30)

    def method(self, name: str) -> Oft:  # noqa: ARG002  # all sites are alike
        return Oft(
            blocks=self.r,
            size=self.oft_block_size,
            shared=self.block_share,
            series=self.num_cayley_neumann_terms if self.use_cayley_neumann else None,
            ball=self.eps if self.coft else None,
            dropout=self.module_dropout,
            zero=self.init_weights,
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any], where: str = "adapter_config.json") -> Self:
        """FormatError too for files whose numbers meant something else, of earlier versions of PEFT."""
        if "auto_mapping" in data:  # as in each file that PEFT writes
            version = str(data.get("peft_version") or "")
            if "oft_block_size" not in data:
                raise FormatError(f"{where}: no oft_block_size{_why_absent(data)}")
            if data.get("use_cayley_neumann") and _release(version) < _SERIES_SINCE:
                raise FormatError(
                    f"{where}: peft_version is {printable(version) or 'not given'}; use_cayley_neumann meant another "
                    f"series before 0.18; {_RETRAIN}"
                )
        return super().from_json(data, where)


def _why_absent(data: Mapping[str, Any]) -> str:
    """Two fields are in each file of the method that OFT was, and in none since."""
    if "rank_pattern" in data or "alpha_pattern" in data:
        return f"; OFT was another method before PEFT 0.14; {_RETRAIN}"
    size = "0, as r counts the blocks" if data.get("r") else "the inputs of a block"
    return f", which PEFT has written since 0.14, and does not load OFT without; put it back: {size}"


def _release(version: str) -> tuple[int, ...]:
    found = re.match(r"(\d{1,9})\.(\d{1,9})", version)
    return tuple(map(int, found.groups())) if found else ()
