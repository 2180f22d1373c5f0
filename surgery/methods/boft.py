"""BOFT: diag(s) W M^T, for a butterfly M of rotations by blocks. https://arxiv.org/abs/2311.06243

M = M_n ... M_1 of M_i = P_i R_i P_i^T, where R_i rotates blocks of b and P_i deals inputs out by halves of blocks: of
each 2^(i - 1) blocks the odd halves come after the even ones. P_1 leaves them where they are.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from surgery.core.arithmetic import all_finite, exact_float64, require_finite
from surgery.core.method import AtStrength, Dense, Mixing, Params, Product, Run
from surgery.core.op import Op, Tile
from surgery.core.site import Site
from surgery.core.spec import Spec
from surgery.errors import MatchError, printable
from surgery.methods.rotations import (
    COPIES,
    FINE,
    Multiply,
    by_blocks,
    cayley,
    cayley_off,
    cayley_solved,
    thinned,
    times,
)
from surgery.methods.spreads import unit_of


@dataclass(frozen=True)
class Boft(AtStrength, Mixing):
    """R is [factors, blocks, b, b], s [out, 1], of a convolution [1, out]; the rotations are Cayley's, of what in R is
    skew.

    All is computed by D = R_i - I, so that where it is zero nothing changes. At another strength than 1 it goes so much
    of the way from the base to the merge.
    """

    size: int  # of a block; it or `blocks` is 0, and follows from the other
    blocks: int
    depth: int = 1  # how many factors M has
    dropout: float = 0.0

    name = "BOFT"

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        op, (out_features, in_features) = site.acting, site.shape
        if op.name != "linear" and (len(op.kernel) != 2 or op.groups > 1):
            groups = f" in {op.groups} groups" if op.groups > 1 else ""
            found = f"a Conv{len(op.kernel)}d{groups}" if op.kernel else f"its op is {op.name}"
            raise MatchError(
                f"{printable(site.name)}: {found}; BOFT acts on Linear and Conv2d in one group, as in PEFT; exclude it"
            )
        b, rest = (self.size, 0) if self.size else divmod(in_features, self.blocks)
        deep = self.depth > max(1, in_features.bit_length())  # told first: of a larger one 2^depth takes long
        if deep or rest or b == 0 or in_features % (b * 2 ** (self.depth - 1)) or (self.depth > 1 and b % 2):
            raise MatchError(
                f"{printable(site.name)}: {in_features} numbers make an output, which cannot be cut into {self._told}; "
                "choose another boft_block_size or boft_block_num, or exclude it"
            )
        scale = (1, out_features) if op.kernel else (out_features, 1)
        return {"R": Spec("boft_R", (self.depth, in_features // b, b, b)), "s": Spec("boft_s", scale)}

    def matrices(self, p: Params, site: Site) -> Params:  # noqa: ARG002  # the shapes tell all
        return {**p, "s": p["s"].flatten()}

    def work_bytes(self, site: Site) -> int:
        """Of D, of all factors at once."""
        return 8 * COPIES * prod(self.tensors(site)["R"].shape)

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:  # noqa: ARG002  # for others
        shapes = {role: spec.shape for role, spec in self.tensors(site).items()}
        return {"R": torch.zeros(shapes["R"]), "s": torch.ones(shapes["s"])}

    def prepared(self, p: Params, product: Product) -> Params:
        """With "D", [factors, blocks, b, b]."""
        for role, values in p.items():
            require_finite(values, role)
        D = cayley(_skew(exact_float64(p["R"])).flatten(0, 1), product)
        return {**p, "D": D.view(p["R"].shape)}

    def merge(self, base: Dense, p: Params, tile: Tile, product: Product) -> Dense:
        p, weight = p if "D" in p else self.prepared(p, product), base.weight
        if not all_finite(weight):  # it stays so, which those who read it refuse
            return base
        turned, multiply = weight.to(p["D"].dtype), partial(times, product)
        for at, D in enumerate(p["D"]):
            turned = turned + _shuffled(turned, D.mT, at, multiply)
        turned = turned * p["s"][tile[0]].to(turned.dtype).unsqueeze(1)
        return base._replace(weight=self._part_of_the_way(weight, turned))

    def strayed(self, base: Tensor, error: Tensor, p: Params, tile: Tile) -> Tensor:
        # Each R_i is off by what `cayley_off` tells, and by the exact product's own. M sums b products for each factor
        # after the first; then as many as M has in a row are summed, of a weight that is rounded to the factors'
        # dtype; then it is scaled.
        unit, (_, _, b, _) = unit_of(p["R"], p["s"]), p["R"].shape
        size, off = base.abs(), error
        Q, eye = _skew(exact_float64(p["R"])), torch.eye(b, dtype=torch.float64, device=base.device)
        for at, D in enumerate(p["D"]):
            R = D.abs() + eye
            grid = b * FINE * D.abs().amax((-2, -1), keepdim=True)
            own = (cayley_off(Q[at], D, unit, unit) + grid).mT
            off = _shuffled(off, R.mT + own, at, torch.matmul) + _shuffled(size, own, at, torch.matmul)
            size = _shuffled(size, R.mT, at, torch.matmul)
        sums = min(base.shape[1], b**self.depth) + (self.depth - 1) * b
        moved: Tensor = (off + (sums + 3) * unit * size) * exact_float64(p["s"])[tile[0]].abs().unsqueeze(1)
        return abs(1 - self.strength) * error + abs(self.strength) * moved

    def settings(self) -> Mapping[str, str]:
        return {"factors": str(self.depth), **super().settings()}

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:
        R, s = self._live(p["R"], training), p["s"].flatten()
        if op.kernel:  # of places that overlap no input can be turned
            weight, bias = run.laid()
            wide = weight.to(torch.promote_types(weight.dtype, R.dtype))
            turned = _turned(wide, R.mT.to(wide.dtype), enumerate) * s.unsqueeze(1)
            made = self._part_of_the_way(wide, turned).to(x.dtype)
            return op.apply(x, made, None if bias is None else bias.to(x.dtype))
        wide = x.to(torch.promote_types(x.dtype, R.dtype))
        turned = _turned(wide.reshape(-1, x.shape[-1]), R.to(wide.dtype), _backwards).view_as(x)
        found, bias = run(turned.to(x.dtype)), run.bias()
        out = found * s if bias is None else found * s + (1 - s) * bias  # a bias is not scaled
        out = out.to(found.dtype)
        return out if self.strength == 1 else self._part_of_the_way(run(x), out)

    def _part_of_the_way(self, base: Tensor, made: Tensor) -> Tensor:
        return made if self.strength == 1 else base + self.strength * (made - base)

    def _live(self, numbers: Tensor, training: bool) -> Tensor:
        """R_i, [factors, blocks, b, b], in the numbers' dtype or float32."""
        with torch.autocast(numbers.device.type, enabled=False):
            Q = _skew(numbers.to(torch.promote_types(numbers.dtype, torch.float32)))
            D = cayley_solved(Q.flatten(0, 1)).view(numbers.shape)
        if training and self.dropout:  # of one factor, drawn anew
            drawn = int(torch.randint(self.depth, ())) if self.depth > 1 else 0
            D = torch.stack([thinned(one, self.dropout) if at == drawn else one for at, one in enumerate(D)])
        return torch.eye(D.shape[-1], dtype=D.dtype, device=D.device) + D

    @property
    def _told(self) -> str:
        told = f"blocks of {self.size}" if self.size else f"{self.blocks} blocks"
        return told if self.depth == 1 else f"{told}, even ones, dealt out {self.depth} times"


def _skew(R: Tensor) -> Tensor:
    return (R - R.mT) / 2


def _backwards(R: Tensor) -> Iterable[tuple[int, Tensor]]:
    return [*enumerate(R)][::-1]


def _turned(rows: Tensor, R: Tensor, order: Callable[[Tensor], Iterable[tuple[int, Tensor]]]) -> Tensor:
    """[n, in] -> [n, in]: by each factor in this order."""
    for at, one in order(R):
        rows = _shuffled(rows, one, at, torch.matmul)
    return rows


def _shuffled(rows: Tensor, D: Tensor, at: int, multiply: Multiply) -> Tensor:
    """rows P D P^T, of the P that belongs to this place among the factors."""
    if at == 0:
        return by_blocks(rows, D, multiply)
    half, count = D.shape[-1] // 2, 2**at
    rows = rows.reshape(len(rows), -1, 2, count, half).transpose(2, 3).flatten(1)
    found = by_blocks(rows, D, multiply).view(len(rows), -1, count, 2, half)
    return found.transpose(2, 3).flatten(1)
