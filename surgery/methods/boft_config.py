"""BOFTConfig: BOFT's settings, named as in PEFT."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self

from surgery.core.spec import Spelling
from surgery.errors import ConfigError
from surgery.methods.bias_config import BiasConfig
from surgery.methods.boft import Boft
from surgery.methods.field_values import check_count, check_dropout

Bias = Literal["none", "all", "boft_only"]


@dataclass(frozen=True, kw_only=True)
class BOFTConfig(BiasConfig):
    """BOFT's settings, named as in PEFT: inputs are rotated by blocks of `boft_block_size`, or by `boft_block_num` of
    them, `boft_n_butterfly_factor` times, each time dealt out anew; and outputs are scaled.

    One of the two is 0, as it follows from the other. R is [factors, blocks, b, b], of which only what is skew counts;
    the scale is [out, 1], of a convolution [1, out]. `boft_dropout` leaves out so many of the blocks of one factor in
    training. PEFT has one factor alone wherever it cannot build its CUDA extension. https://arxiv.org/abs/2311.06243

    >>> import surgery, torch
    >>> model = torch.nn.ModuleDict({"up": torch.nn.Linear(16, 6)})
    >>> model = surgery.inject(model, BOFTConfig(boft_n_butterfly_factor=2, target_modules=["up"]))
    >>> list(model["up"].boft_R["default"].shape), list(model["up"].boft_s["default"].shape)
    ([2, 4, 4, 4], [6, 1])
    """

    peft_type: ClassVar[str] = "BOFT"
    bias_of_adapted = "boft_only"
    spellings: ClassVar[Mapping[str, Spelling]] = {"boft_R": Spelling("R"), "boft_s": Spelling("s")}
    neutral: ClassVar[Mapping[str, Any]] = {}

    boft_block_size: int = 4
    boft_block_num: int = 0
    boft_n_butterfly_factor: int = 1
    boft_dropout: float = 0.0
    fan_in_fan_out: bool = False  # read and written for PEFT, which turns it off
    bias: Bias = "none"  # which biases of the base are trained
    init_weights: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("boft_block_size", self.boft_block_size, 0)
        check_count("boft_block_num", self.boft_block_num, 0)
        if (self.boft_block_size == 0) == (self.boft_block_num == 0):
            raise ConfigError(
                f"boft_block_size is {self.boft_block_size} and boft_block_num is {self.boft_block_num}; just one of "
                "them must be 0, as it follows from the other"
            )
        check_count("boft_n_butterfly_factor", self.boft_n_butterfly_factor)
        check_dropout("boft_dropout", self.boft_dropout)
        if not self.init_weights:
            raise ConfigError("init_weights is False; PEFT's BOFT has no other start than the identity; leave it out")

    def as_shaped(self, shapes: Mapping[str, Mapping[str, tuple[int, ...]]]) -> Self:
        """PEFT trains one factor, whatever its config says, where it has no CUDA extension."""
        alone = {shape["R"][0] for shape in shapes.values() if shape["R"]} == {1}
        return replace(self, boft_n_butterfly_factor=1) if alone else self

    def method(self, name: str) -> Boft:  # noqa: ARG002  # all sites are alike
        return Boft(self.boft_block_size, self.boft_block_num, self.boft_n_butterfly_factor, self.boft_dropout)
