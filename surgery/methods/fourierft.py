"""FourierFT: W + scaling * real(ifft2(S)), where S has c at random places. https://arxiv.org/abs/2405.03003"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.core.arithmetic import factor_bytes, float_product
from surgery.core.method import Additive, Dense, Params, Product, Run
from surgery.core.one_step import may_be_one_step
from surgery.core.op import Op, Tile, in_dtype_of
from surgery.core.patterns import BELOW
from surgery.core.select import pattern_value
from surgery.core.site import Site
from surgery.core.spec import Spec, Spelling
from surgery.methods.bias_config import BiasConfig
from surgery.methods.drawn_places import check_fields, check_room, place_bytes, places
from surgery.methods.fourier import Laid, Spectral, half_places, transformed
from surgery.methods.frequencies import factors
from surgery.methods.spreads import prime_factors, unit_of

Bias = Literal["none", "all", "fourier_only"]


@dataclass(frozen=True, kw_only=True)
class FourierFTConfig(BiasConfig):
    """FourierFT's settings, named as in PEFT: `n_frequency` numbers of a weight's spectrum are trained.

    Their places are drawn by `random_loc_seed`, the same as PEFT's, and stand in no file. A fresh adapter changes the
    outputs, as in PEFT, unless `init_weights` is true. https://arxiv.org/abs/2405.03003

    >>> import surgery, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(16, 8))
    >>> _ = surgery.inject(model, FourierFTConfig(n_frequency=20, target_modules=["0"]))
    >>> model[0].fourierft_spectrum["default"].shape, model(torch.ones(3, 16)).shape
    (torch.Size([20]), torch.Size([3, 8]))
    """

    peft_type: ClassVar[str] = "FOURIERFT"
    bias_of_adapted = "fourier_only"
    spellings: ClassVar[Mapping[str, Spelling]] = {"fourierft_spectrum": Spelling("c")}
    neutral: ClassVar[Mapping[str, Any]] = {}
    draws_places = True
    pattern_form = BELOW

    n_frequency: int = 1000
    scaling: float = 150.0
    random_loc_seed: int = 777
    fan_in_fan_out: bool = False  # read and written for PEFT; the op decides, see hosts
    bias: Bias = "none"  # which biases of the base are trained
    n_frequency_pattern: Mapping[str, int] = field(default_factory=dict)
    init_weights: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self.n_frequency, self.scaling, self.random_loc_seed, self.n_frequency_pattern)

    def method(self, name: str) -> "FourierFT":
        count = pattern_value(self.n_frequency_pattern, name, self.n_frequency)
        return FourierFT(float(self.scaling), count, self.random_loc_seed, self.init_weights)

    def told(self, name: str) -> Mapping[str, float]:
        return {"n_frequency": pattern_value(self.n_frequency_pattern, name, self.n_frequency)}


@dataclass(frozen=True)
class FourierFT(Additive):
    """c is [count]."""

    count: int
    seed: int = 777
    zero: bool = False  # does c begin as zeros?

    name = "FourierFT"

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        check_room(site, self.name, self.count)
        return {"c": Spec("fourierft_spectrum", (self.count,))}

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:  # noqa: ARG002  # for others
        shape = self.tensors(site)["c"].shape
        return {"c": torch.zeros(shape) if self.zero else torch.randn(shape)}

    def matrices(self, p: Params, site: Site) -> Params:
        B, A = factors(p["c"], places(p["c"], self.seed, site.shape), site.shape)
        return {**p, "B": B, "A": A}

    def work_bytes(self, site: Site) -> int:
        r = 2 * min(self.count, min(site.shape) // 2 + 1)
        return factor_bytes(site.shape, r) + place_bytes(site.shape)

    def settings(self) -> Mapping[str, str]:
        return {**super().settings(), "seed": str(self.seed)}

    def delta(self, p: Params, tile: Tile, product: Product) -> Tensor:
        return product(p["B"], p["A"], tile, self.scaling / (len(p["B"]) * p["A"].shape[1]))

    def spread(self, p: Params, tile: Tile) -> Tensor:
        # The product's grid (see `exact_product`); and PEFT's transform, in float32. Each number of S goes to each
        # element through a pass for every prime factor q of a side, in which it is turned, by a complex product of at
        # most sqrt(5) units and a factor that is itself rounded, and is one of q that are summed: q + 2 units of its
        # magnitude, which no pass changes. The rest: the division by out * in, the scaling, and rounding to c's dtype.
        B, A, c = p["B"], p["A"], p["c"]
        size = len(B) * A.shape[1]
        unit = torch.finfo(torch.float32).eps / 2
        passes = sum(q + 2 for side in (len(B), A.shape[1]) for q in prime_factors(side))
        grid = len(A) * 2.0**-21 * B[tile[0]].abs().amax(1, keepdim=True) * A[:, tile[1]].abs().amax(0, keepdim=True)
        found = (grid + (passes + 3) * unit * float(c.double().abs().sum())) * (abs(self.scaling) / size)
        return found if c.dtype.itemsize >= 4 else found + unit_of(c) * self.delta(p, tile, float_product).abs()

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:  # noqa: ARG002  # no dropout
        c, plain = p["c"], run.plain()
        if plain is None:
            below = run(x)
            return below + self._added(x, c, (below.shape[-1], x.shape[-1]))
        shape = plain.weight.shape[0], plain.weight.shape[1]
        if _few(x, shape, self.count) or not may_be_one_step(x, plain.weight, c):
            return run(x) + self._added(x, c, shape)
        half = half_places(c, self.seed, shape)
        out: Tensor = Laid.apply(x, *plain, c * self.scaling, half, shape)  # type: ignore[no-untyped-call]
        return out

    def _added(self, x: Tensor, c: Tensor, shape: tuple[int, int]) -> Tensor:
        """What it adds to the output of a weight of this shape."""
        half, x = half_places(c, self.seed, shape), in_dtype_of(c, x)
        if _few(x, shape, self.count) and may_be_one_step(x, c):
            moved: Tensor = Spectral.apply(x, c * self.scaling, half, shape)  # type: ignore[no-untyped-call]
            return moved
        wide = c.to(torch.promote_types(c.dtype, torch.float32))  # no transform is of half types
        return F.linear(x, (transformed(wide, half, shape) * self.scaling).to(c.dtype))


def _few(x: Tensor, shape: tuple[int, int], count: int) -> bool:
    """Do products in the spectrum of an input take less than a matrix of the weight's shape?"""
    rows = x.numel() // shape[1]
    return 0 < rows * (sum(shape) + 2 * count) < shape[0] * shape[1]
