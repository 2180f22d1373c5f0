"""OFT: W R^T, for R that rotates blocks of inputs; over an embedding R^T W. https://arxiv.org/abs/2306.07280"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import sqrt

import torch
from torch import Tensor

from surgery.core.arithmetic import all_finite, exact_float64, require_finite
from surgery.core.method import AtStrength, Dense, Mixing, Params, Product, Run
from surgery.core.op import Op, Tile
from surgery.core.site import Site
from surgery.core.spec import Spec
from surgery.core.sums import row_sums
from surgery.errors import MatchError, printable
from surgery.methods.rotations import (
    COPIES,
    FINE,
    SPLITS,
    block_of,
    by_blocks,
    cayley,
    cayley_off,
    cayley_solved,
    last_power,
    neumann,
    neumann_off,
    skew,
    thinned,
    times,
)
from surgery.methods.spreads import unit_of


@dataclass(frozen=True)
class Oft(AtStrength, Mixing):
    """The tensor is [blocks, b (b - 1) / 2], what lies above the diagonal of each block's skew Q; see rotations.

    All is computed by D = R - I, so that where it is zero nothing changes. At another strength than 1 it goes so much
    of the way from the base to the merge.
    """

    blocks: int
    size: int  # of a block; it or `blocks` is 0, and follows from the other
    shared: bool = False  # is there one for all blocks?
    series: int | None = 5  # how many terms it has; None: Cayley's transform
    ball: float | None = None  # the largest norm of all Q together
    dropout: float = 0.0
    zero: bool = True

    name = "OFT"

    def block(self, extent: int) -> int:
        """b over so many inputs: what divides them and is nearest to what is asked for; of two the smaller."""
        return _divisor(extent, self.size) if self.size else extent // _divisor(extent, self.blocks)

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        op, (out_features, in_features) = site.acting, site.shape
        if op.name not in {"linear", "embedding"} and (op.kernel != (1, 1) or op.groups > 1):
            raise MatchError(
                f"{printable(site.name)}: {_found(op)}; OFT acts on Linear, Embedding and Conv2d of one place in one "
                "group; exclude it"
            )
        embeds = op.name == "embedding"
        extent = out_features if embeds else in_features
        b = self.block(extent)
        shape = (1 if self.shared else extent // b, b * (b - 1) // 2)
        return {"R": Spec("oft_embedding_R.weight" if embeds else "oft_R.weight", shape)}

    def matrices(self, p: Params, site: Site) -> Params:
        """R by the side that it stands on: "R" right of the weight, transposed, or "L" left of it."""
        return {"L": p["R"]} if site.acting.name == "embedding" else p

    def work_bytes(self, site: Site) -> int:
        """Of D, which lies in as many blocks as R has, and is taken in as many as the rows have."""
        (spec,) = self.tensors(site).values()
        blocks, b = spec.shape[0], block_of(spec.shape[1])
        extent = site.shape[0 if site.acting.name == "embedding" else 1]
        return 8 * b * b * max(COPIES * blocks, blocks + SPLITS * (extent // b))

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:  # noqa: ARG002  # for others
        (spec,) = self.tensors(site).values()
        return {"R": torch.zeros(spec.shape) if self.zero else torch.randn(spec.shape) * 0.1}

    def prepared(self, p: Params, product: Product) -> Params:
        """With "D", [blocks, b, b], by which `merge` multiplies rows."""
        side, numbers = next(iter(p.items()))
        require_finite(numbers, "R")
        Q = skew(self._within(exact_float64(numbers)))
        D = cayley(Q, product) if self.series is None else neumann(Q, self.series, partial(times, product))
        return {**p, "D": D if side == "L" else D.mT}

    def merge(self, base: Dense, p: Params, tile: Tile, product: Product) -> Dense:  # noqa: ARG002  # of whole rows
        p, weight = p if "D" in p else self.prepared(p, product), base.weight
        if not all_finite(weight):  # it stays so, which those who read it refuse
            return base
        rows = weight.T if "L" in p else weight
        moved = self.strength * by_blocks(rows.to(p["D"].dtype), p["D"], partial(times, product))
        return base._replace(weight=weight + (moved.T if "L" in p else moved))

    def strayed(self, base: Tensor, error: Tensor, p: Params, tile: Tile) -> Tensor:  # noqa: ARG002  # of whole rows
        # R is off by what `_off` tells. Then b products are summed, of a weight that is rounded to the factors' dtype,
        # and the outcome is rounded to it. The last term is the exact product's own.
        D, turned = p["D"].abs(), "L" in p
        unit, b = unit_of(p["L" if turned else "R"]), D.shape[-1]
        size = D + torch.eye(b, dtype=D.dtype, device=D.device)
        largest = D.amax((-2, -1), keepdim=True).expand(D.shape)
        own = (b + 2) * unit * size + self._off(p, unit) + b * FINE * largest
        rows, errors = (one.T.abs() if turned else one.abs() for one in (base, error))
        moved = by_blocks(errors, D, torch.matmul) + by_blocks(rows, own, torch.matmul)
        total = errors + abs(self.strength) * moved
        return total.T if turned else total

    def settings(self) -> Mapping[str, str]:
        by = "cayley" if self.series is None else f"neumann to the power of {last_power(self.series)}"
        ball = {} if self.ball is None else {"ball": self.ball.hex()}
        return {"rotation": by, **ball, **super().settings()}

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:
        R = self._live(p["R"], training)
        if op.name != "embedding":
            return run(_turned(x, R, op))
        out, bias = run(x), run.bias()
        return _turned(out, R, op) if bias is None else _turned(out - bias, R, op) + bias

    def _live(self, numbers: Tensor, training: bool) -> Tensor:
        """R [blocks, b, b], in the numbers' dtype or float32."""
        numbers = numbers if self.ball is None else self._held(numbers, training)
        with torch.autocast(numbers.device.type, enabled=False):
            Q = skew(numbers.to(torch.promote_types(numbers.dtype, torch.float32)))
            D = cayley_solved(Q) if self.series is None else neumann(Q, self.series, torch.matmul)
        D = thinned(D, self.dropout) if training else D
        return torch.eye(D.shape[-1], dtype=D.dtype, device=D.device) + (D if self.strength == 1 else self.strength * D)

    def _held(self, numbers: Tensor, training: bool) -> Tensor:
        """Within the ball; a gradient passes as if they had been there before."""
        within = self._within(numbers.detach())
        if not (training and numbers.requires_grad and torch.is_grad_enabled()):
            return within + (numbers - numbers.detach())
        # Written, as in PEFT: the step that follows begins there. Unwritten it would begin beyond the ball, and where
        # it ended, and so what is saved and merged, would be another. What takes no step is left as it is.
        with torch.no_grad():
            numbers.copy_(within)
        return numbers

    def _within(self, numbers: Tensor) -> Tensor:
        """Each block's numbers, cut to norm `ball` / sqrt(2 blocks), which its Q has both below and above."""
        if self.ball is None:
            return numbers
        most = self.ball / sqrt(len(numbers))  # rounded once on any machine, as a power is not
        norm = (2 * row_sums(numbers * numbers).unsqueeze(1)).sqrt()  # [blocks, 1]
        inside = norm <= most
        return torch.where(inside, numbers, numbers * (most / norm.masked_fill(inside, 1)))

    def _off(self, p: Params, unit: float) -> Tensor:
        """[blocks, b, b]: how far from R that of PEFT may be, as it multiplies rows."""
        turned = "L" in p
        numbers = exact_float64(p["L" if turned else "R"])
        Q, D = skew(self._within(numbers)), p["D"] if turned else p["D"].mT
        rough = 0.0 if self.ball is None else (Q.shape[-1] ** 2 + 4) * unit  # of a norm, a quotient and a product
        off = cayley_off(Q, D, unit, rough) if self.series is None else neumann_off(Q, self.series, unit, rough)
        return off if turned else off.mT


def _turned(x: Tensor, R: Tensor, op: Op) -> Tensor:
    """x R, along the axis of its features, in its dtype."""
    wide = x.to(torch.promote_types(x.dtype, R.dtype))
    R = R.to(wide.dtype)
    if op.kernel:  # [batch, channels, *places], or without the batch
        batch, places = x.shape[: -len(op.kernel) - 1], x.shape[-2:].numel()
        found = R.mT @ wide.reshape(*batch, -1, R.shape[-1], places)  # [*batch, blocks, b, places]
    else:
        found = by_blocks(wide.reshape(-1, x.shape[-1]), R, torch.matmul)
    return found.reshape(x.shape).to(x.dtype)


def _found(op: Op) -> str:
    """What it does not act on."""
    if not op.kernel:
        return f"its op is {op.name}"
    if max(op.kernel) == 1 or len(op.kernel) != 2:
        return f"a Conv{len(op.kernel)}d" + (f" in {op.groups} groups" if op.groups > 1 else "")
    return (
        f"a convolution over {list(op.kernel)}, for which PEFT's OFT changes the outputs before anything is trained, "
        "and merges into a weight that gives others again"
    )


def _divisor(extent: int, wanted: int) -> int:
    """The divisor of `extent` that is nearest to what is wanted; of two the smaller."""
    lower = next(one for one in range(min(wanted, extent), 0, -1) if extent % one == 0)
    higher = next(one for one in range(min(wanted, extent), extent + 1) if extent % one == 0)
    return lower if wanted - lower <= higher - wanted or wanted >= extent else higher
