"""VB-LoRA: W + B A, made of vectors of one bank for all sites, mixed by the softmax of their largest logits.

https://arxiv.org/abs/2405.15179
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from surgery.core.arithmetic import exact_float64, factor_bytes, require_finite
from surgery.core.exponential import exp
from surgery.core.method import Additive, Dense, Params, Product, Run
from surgery.core.op import Factors, Op, Tile
from surgery.core.site import Site
from surgery.core.spec import Spec
from surgery.core.sums import added
from surgery.errors import MatchError, ValueRangeError, printable
from surgery.methods.acts_on import only_linear_or_conv1d
from surgery.methods.factored import factored
from surgery.methods.spreads import product_spread, unit_of

Mix = tuple[Tensor, Tensor]  # which vectors each part is made of, and how much of each: [..., topk] both
_SIDES = ("A", "B")
_FLOAT32 = torch.finfo(torch.float32).eps / 2  # what it rounds by


@dataclass(frozen=True)
class Banked(Additive):
    """`vectors` is [num_vectors, vector_length]; what mixes them is [r, in / vector_length, ...] of A and
    [out / vector_length, r, ...] of B."""

    r: int
    topk: int
    num_vectors: int
    vector_length: int
    dropout: float = 0.0

    name = "VB-LoRA"

    @abstractmethod
    def own(self, side: str, parts: tuple[int, int]) -> Mapping[str, Spec]:
        """Its tensors of A or B, which has parts [r, in / vector_length] or [out / vector_length, r]."""

    @abstractmethod
    def mix(self, p: Params, side: str) -> Mix:
        """As the layer runs, differentiable."""

    @abstractmethod
    def exact_mix(self, p: Params, side: str) -> Mix:
        """The same in float64, by a fixed sequence of operations."""

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        only_linear_or_conv1d(site, self.name)
        (out_features, in_features), length = site.shape, self.vector_length
        if out_features % length or in_features % length:
            raise MatchError(
                f"{printable(site.name)}: vector_length is {length}, of which its {in_features} inputs and "
                f"{out_features} outputs are no multiples; choose one that divides both, or exclude it"
            )
        bank = Spec("vblora_vector_bank", (self.num_vectors, length), shared=True)
        of_A, of_B = (self.r, in_features // length), (out_features // length, self.r)
        return {**self.own("A", of_A), **self.own("B", of_B), "vectors": bank}

    def matrices(self, p: Params, site: Site) -> Params:  # noqa: ARG002  # the tensors tell
        for role, values in p.items():  # what is not among the largest would pass unseen
            require_finite(values, role)
        vectors = exact_float64(p["vectors"])
        A, B = (_summed(*self.exact_mix(p, side), vectors) for side in _SIDES)
        return {**p, "A": _rows(A), "B": _columns(B)}

    def work_bytes(self, site: Site) -> int:
        return 2 * factor_bytes(site.shape, self.r)

    def delta(self, p: Params, tile: Tile, product: Product) -> Tensor:
        return product(p["B"], p["A"], tile, self.scaling)

    def directions(self, p: Params) -> Tensor:
        return p["A"]

    def settings(self) -> Mapping[str, str]:
        return {**super().settings(), "topk": str(self.topk)}

    def spread(self, p: Params, tile: Tile) -> Tensor:
        A, B = p["A"][:, tile[1]], p["B"][tile[0]]
        unit = unit_of(*(values for role, values in p.items() if role not in _SIDES and values.is_floating_point()))
        off_A, off_B = (self._off(p, side, unit) for side in _SIDES)
        off_A, off_B = _rows(off_A)[:, tile[1]], _columns(off_B)[tile[0]]
        mixed = off_B @ (A.abs() + off_A) + B.abs() @ off_A
        return abs(self.scaling) * (mixed + product_spread(B, A, unit))

    def _off(self, p: Params, side: str, unit: float) -> Tensor:
        """How far a correct sum of vectors may lie from the exact one."""
        at, weights = self.exact_mix(p, side)
        weights, vectors = weights.abs(), exact_float64(p["vectors"]).abs()
        # A softmax is computed in float32 or wider: its exponents round by a unit of theirs, two exponentials by two
        # units each, the division and topk - 1 sums by one. Then it is rounded to the dtype, as are the product with
        # a vector and topk - 1 sums of such.
        fine = min(unit, _FLOAT32)
        rounded = (self.topk + 4) * fine + (self.topk + 1) * unit
        off = rounded * weights + _by_exponents(weights, fine) + self._read_off(weights, unit)
        return _summed(at, off, vectors)

    def _read_off(self, weights: Tensor, unit: float) -> Tensor:  # noqa: ARG002  # of those that files hold as logits
        """The same of weights that the softmax is given by other numbers than logits."""
        return torch.zeros_like(weights)

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:
        vectors = p["vectors"].to(x.device)  # of layers on several devices
        A, B = (_bagged(*self.mix(p, side), vectors) for side in _SIDES)
        return factored(x, run, op, Factors(_rows(A), _columns(B), self.scaling), self.dropout if training else 0.0)


@dataclass(frozen=True)
class VBLoRA(Banked):
    """`logits_A` is [r, in / vector_length, num_vectors], `logits_B` [out / vector_length, r, num_vectors]."""

    std: float = 0.1  # of the normal numbers that they begin as

    def own(self, side: str, parts: tuple[int, int]) -> Mapping[str, Spec]:
        return {f"logits_{side}": Spec(f"vblora_logits_{side}", (*parts, self.num_vectors))}

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:  # noqa: ARG002  # for others
        specs = self.tensors(site)
        return {role: torch.randn(specs[role].shape) * self.std for role in ("logits_A", "logits_B")}

    def mix(self, p: Params, side: str) -> Mix:
        largest, at = p[f"logits_{side}"].topk(self.topk, -1)
        return at, largest.softmax(-1)

    def exact_mix(self, p: Params, side: str) -> Mix:
        wide = exact_float64(p[f"logits_{side}"])
        at = _largest(wide, self.topk)
        largest = wide.gather(-1, at)
        powers = exp(largest - largest[..., :1])
        return at, powers / added(torch.split(powers, 1, -1))

    def work_bytes(self, site: Site) -> int:
        """With the logits in float64 and sorted, of one side at a time."""
        return super().work_bytes(site) + 3 * 8 * self.r * self.num_vectors * max(site.shape) // self.vector_length


@dataclass(frozen=True)
class VBLoRAOfTopK(Banked):
    """`at_A` and `at_B` are [..., topk], `part_A` and `part_B` [..., topk - 1]: the last part is what is left of 1."""

    def own(self, side: str, parts: tuple[int, int]) -> Mapping[str, Spec]:
        spelling = f"vblora_logits_{side}_topk"
        return {
            f"at_{side}": Spec(f"{spelling}_indices", (*parts, self.topk), fixed=True),
            f"part_{side}": Spec(f"{spelling}_weights", (*parts, self.topk - 1), fixed=True),
        }

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:  # noqa: ARG002  # nothing to make
        raise AssertionError("a fresh adapter has logits")

    def check_values(self, p: Params, site: Site, where: str) -> None:
        for side in _SIDES:
            at = p[f"at_{side}"]
            if int(at.min()) < 0 or int(at.max()) >= self.num_vectors:
                raise ValueRangeError(
                    f"{printable(where)}: {printable(site.name)}: vblora_logits_{side}_topk_indices holds indices "
                    f"beyond a bank of {self.num_vectors} vectors; those of its vectors are wanted; save or download "
                    "it again"
                )

    def mix(self, p: Params, side: str) -> Mix:
        at, parts = p[f"at_{side}"].to(torch.int64), p[f"part_{side}"]
        return at, torch.cat([parts, 1 - parts.sum(-1, keepdim=True)], -1)

    def exact_mix(self, p: Params, side: str) -> Mix:
        parts = exact_float64(p[f"part_{side}"])
        rest = (
            1 - added(torch.split(parts, 1, -1))
            if self.topk > 1
            else torch.ones_like(p[f"at_{side}"], dtype=torch.float64)
        )
        return p[f"at_{side}"].to(rest.device, torch.int64), torch.cat([parts, rest], -1)

    def _read_off(self, weights: Tensor, unit: float) -> Tensor:
        # PEFT takes logarithms: each is computed to a unit of float32, or wider, and rounded to the dtype. What is
        # left of 1 is off by the roundings of topk sums, by which all are divided then.
        is_rest = torch.ones_like(weights).cumsum(-1) == self.topk
        return _by_exponents(weights, unit + min(unit, _FLOAT32)) + self.topk * unit * (is_rest + weights)


def of_top_k(p: Params, topk: int) -> Params:
    """What the logits come to, as PEFT writes it: by places of theirs, without the last weight."""
    held: dict[str, Tensor] = {}
    for side in _SIDES:
        logits = p[f"logits_{side}"].detach()
        at = _largest(logits, topk)
        held |= {f"at_{side}": at, f"part_{side}": logits.gather(-1, at).softmax(-1)[..., :-1].contiguous()}
    return held


def _largest(logits: Tensor, topk: int) -> Tensor:
    """[..., topk]: where the largest are, in order; of equal ones those that come first, on any machine."""
    wide = exact_float64(logits.detach()) + 0.0  # which makes of -0.0 and 0.0 the same bits
    return torch.sort(wide, dim=-1, descending=True, stable=True).indices[..., :topk].to(logits.device)


def _by_exponents(weights: Tensor, unit: float) -> Tensor:
    """What weights are off by, where each exponent is by a unit of it: its own, and all in the sum that divides."""
    far = weights.clamp(min=2.0**-1000).log().abs()
    return unit * weights * (far + (weights * far).sum(-1, keepdim=True))


def _summed(at: Tensor, weights: Tensor, vectors: Tensor) -> Tensor:
    """[..., vector_length]: the weighted vectors at these places, added in their order."""
    places = zip(at.unbind(-1), torch.split(weights, 1, -1), strict=True)
    return added(weight * vectors[place] for place, weight in places)


def _bagged(at: Tensor, weights: Tensor, vectors: Tensor) -> Tensor:
    """The same, in one step."""
    found = F.embedding_bag(at.flatten(0, 1), vectors, per_sample_weights=weights.flatten(0, 1), mode="sum")
    return found.view(*at.shape[:2], -1)


def _rows(A: Tensor) -> Tensor:
    """[r, in / vector_length, vector_length] -> [r, in]."""
    return A.flatten(1)


def _columns(B: Tensor) -> Tensor:
    """[out / vector_length, r, vector_length] -> [out, r]."""
    return B.transpose(1, 2).flatten(0, 1)
