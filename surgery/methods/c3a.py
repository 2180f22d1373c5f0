"""C3A: W + C / in, where C consists of circulant blocks, each told by its kernel. https://arxiv.org/abs/2407.19342"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from surgery.core.arithmetic import divided, exact_float64
from surgery.core.elementwise import Shift
from surgery.core.method import Dense, Params, Product, Run
from surgery.core.one_step import may_be_one_step
from surgery.core.op import Op, Tile, onto
from surgery.core.select import pattern_value
from surgery.core.site import Site
from surgery.core.spec import Spec, Spelling
from surgery.errors import ConfigError, MatchError, printable, quoted
from surgery.methods.acts_on import only_linear
from surgery.methods.bias_config import BiasConfig
from surgery.methods.circular import Circular, circular
from surgery.methods.field_values import check_count, check_counts
from surgery.methods.placed import Placed
from surgery.methods.spreads import prime_factors

Drawn = Literal["gaussian", "kaiming_uniform", "xavier_uniform"]
Bias = Literal["none", "all", "c3a_only"]


@dataclass(frozen=True, kw_only=True)
class C3AConfig(BiasConfig):
    """C3A's settings, named as in PEFT: kernels [out / block_size, in / block_size, block_size] of circulant blocks.

    The block size divides the inputs and outputs of each layer. A fresh adapter changes the outputs, as in PEFT,
    unless `init_weights` is True. https://arxiv.org/abs/2407.19342

    >>> config = C3AConfig(block_size=64, block_size_pattern={"down_proj": 32}, target_modules=["q_proj", "down_proj"])
    >>> config.method("0.q_proj").block, config.method("0.down_proj").block
    (64, 32)
    """

    peft_type: ClassVar[str] = "C3A"
    bias_of_adapted = "c3a_only"
    spellings: ClassVar[Mapping[str, Spelling]] = {"c3a_kernel": Spelling("w")}
    neutral: ClassVar[Mapping[str, Any]] = {}
    unwritten = frozenset({"exclude_modules"})

    block_size: int = 256
    block_size_pattern: Mapping[str, int] = field(default_factory=dict)
    init_weights: bool | Drawn = "xavier_uniform"
    bias: Bias = "none"  # which biases of the base are trained

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("block_size", self.block_size)
        if not isinstance(self.block_size_pattern, Mapping):
            raise ConfigError(f"block_size_pattern is {quoted(self.block_size_pattern)}; a table is wanted")
        check_counts("block_size_pattern", self.block_size_pattern)
        if not isinstance(self.init_weights, bool) and self.init_weights not in get_args(Drawn):
            wanted = ", ".join(map(repr, get_args(Drawn)))
            raise ConfigError(f"init_weights is {quoted(self.init_weights)}; true, false, {wanted} is wanted")

    def method(self, name: str) -> "C3A":
        drawn = None if self.init_weights is True else self.init_weights or "xavier_uniform"
        return C3A(1.0, pattern_value(self.block_size_pattern, name, self.block_size), drawn)


@dataclass(frozen=True)
class _Divided(Shift):
    """Of numbers that PEFT rounds to the weight's dtype twice: before it divides them by `in`, and after."""

    def rounded(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
        held, outcome = super().rounded(before, after)
        return 2 * held, outcome  # half an ulp of which is twice that


@dataclass(frozen=True)
class C3A(Placed):
    """w is [out / block, in / block, block]; row k of a block is its kernel, turned k places to the right."""

    block: int
    drawn: Drawn | None = None  # how w begins; as zeros if not

    name = "C3A"

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        only_linear(site, self.name)
        out_features, in_features = site.shape
        if out_features % self.block or in_features % self.block:
            raise MatchError(
                f"{printable(site.name)}: block_size is {self.block}, of which its {in_features} inputs and "
                f"{out_features} outputs are no multiples; choose one that divides both, such as "
                f"{math.gcd(in_features, out_features)}, or exclude it"
            )
        return {"w": Spec("c3a_kernel", (out_features // self.block, in_features // self.block, self.block))}

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:  # noqa: ARG002  # for others
        w, (out_features, in_features) = torch.zeros(self.tensors(site)["w"].shape), site.shape
        if self.drawn == "gaussian":
            w.normal_()
        elif self.drawn is not None:
            of_both = self.drawn == "xavier_uniform"
            bound = math.sqrt(6 / (in_features + out_features)) if of_both else math.sqrt(1 / in_features)
            w.uniform_(-bound, bound)
        return {"w": w}

    def steps(self, p: Params, tile: Tile, product: Product) -> Shift:
        return _Divided(super().steps(p, tile, product).values)

    def numbers(self, p: Params, tile: Tile) -> Tensor:
        rows, columns = tile
        w = p["w"]
        high, wide, block = w.shape
        w = divided(w, wide * block)
        turned = torch.cat([w, w], 2).unfold(2, block, 1)  # [out / block, in / block, block + 1, block], a view
        at = torch.arange(high * block, device=w.device)[rows]
        return turned[at // block, :, block - at % block].flatten(1)[:, columns]

    def spread(self, p: Params, tile: Tile) -> Tensor:
        # PEFT makes a block of three transforms in float32, of one number in the middle of zeros, of the kernel, and
        # of their product. One of length b is a pass for each prime factor q of b: sums of q products, complex, whose
        # error is at most sqrt(q) (q + 4) units of the norm that passes through, and no pass changes that norm but by
        # the transform's own scale. The rest: that product, the division by `in`, the scaling.
        w = exact_float64(p["w"])
        unit = torch.finfo(torch.promote_types(p["w"].dtype, torch.float32)).eps / 2
        passes = sum(math.sqrt(q) * (q + 4) for q in prime_factors(self.block))
        norms: Tensor = torch.linalg.vector_norm(w, dim=2)  # [out / block, in / block]
        each = norms * ((3 * passes + 5) * unit * abs(self.scaling) / (w.shape[1] * self.block))
        at = torch.arange(len(w) * self.block, device=w.device)[tile[0]]
        return each.index_select(0, at // self.block).repeat_interleave(self.block, 1)[:, tile[1]]

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:  # noqa: ARG002  # no dropout
        below, wide = run(x), torch.promote_types(p["w"].dtype, torch.float32)  # no transform is of half types
        x, w = x.to(wide), p["w"].to(wide)
        moved: Tensor = Circular.apply(x, w) if may_be_one_step(x, w) else circular(x, w)  # type: ignore[no-untyped-call]
        return onto(below, moved, self.scaling / x.shape[-1])
