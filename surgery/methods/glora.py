"""GLoRA: W + W * A + B, and bias + bias * D + E + W C; A to E are products, vectors, numbers or none.

https://arxiv.org/abs/2306.07967
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.core.arithmetic import exact_float64, exact_product
from surgery.core.elementwise import Growth
from surgery.core.layered import laid_on_bias
from surgery.core.method import AtStrength, Dense, Params, Product, Run
from surgery.core.op import Op, Tile, in_dtype_of
from surgery.core.rounding import ulp
from surgery.core.site import Site
from surgery.core.spec import Spec
from surgery.errors import ValueRangeError, printable
from surgery.methods.acts_on import only_linear
from surgery.methods.kaiming import kaiming
from surgery.methods.spreads import product_spread, unit_of

# By kind, how the tensors of a letter end. PEFT holds zeros, as large as what they stand for, where there is none.
ENDS: Mapping[str, Mapping[str, str]] = {
    "lora": {"d": "Xd", "u": "Xu"},
    "vector": {"": "X"},
    "constant": {"": "X"},
    "none": {"0": "zeros"},
}
_SINGLE = torch.finfo(torch.float32).eps / 2


@dataclass(frozen=True)
class Glora(AtStrength):
    """Of a product the tensors are Xd [n, r] and Xu [r, m], by role such as "Ad" and "Au"; else X, or zeros, "A0".

    A and B are [out, in], [out, 1] or [1]; C is [in, 1]; D and E are [out] or [1]. Without a bias, C, D and E are
    none. W and bias are the base's, also over other adapters, as several of its kind are taken in PEFT.
    """

    r: int
    kinds: tuple[str, str, str]  # of A and B, of C, of D and E
    zeros: bool = True  # does it begin without effect?

    name = "GLoRA"
    of_base = True
    couples = frozenset()

    @property
    def leaves_weight(self) -> bool:
        return self.kinds[0] == "none"

    def tensors(self, site: Site) -> Mapping[str, Spec]:
        only_linear(site, self.name)
        out_features, in_features = site.shape
        on_weight, of_weight, on_bias = self.kinds if "bias" in site.tensors else (self.kinds[0], "none", "none")
        return {
            **self._specs("A", on_weight, (out_features, in_features)),
            **self._specs("B", on_weight, (out_features, in_features)),
            **self._specs("C", of_weight, (in_features, 1)),
            **self._specs("D", on_bias, (out_features,)),
            **self._specs("E", on_bias, (out_features,)),
        }

    def _specs(self, letter: str, kind: str, shape: tuple[int, ...]) -> dict[str, Spec]:
        shapes = {
            "d": (shape[0], self.r),
            "u": (self.r, *shape[1:]),
            "": (1,) if kind == "constant" else (shape[0], *(1 for _ in shape[1:])),
            "0": shape,
        }
        found = {}
        for end, leaf in ENDS[kind].items():
            found[f"{letter}{end}"] = Spec(f"glora_{letter}.{leaf}", shapes[end], fixed=kind == "none")
        return found

    def check_values(self, p: Params, site: Site, where: str) -> None:
        for role, values in p.items():
            if role.endswith("0") and bool(values.any()):
                raise ValueRangeError(
                    f"{printable(where)}: {printable(site.name)}: glora_{role[0]}.zeros holds other numbers; save it "
                    "again, or download it again"
                )

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:  # noqa: ARG002  # as others'
        found = {}
        for role, (_, shape, *_) in self.tensors(site).items():
            if role.endswith("0") or (self.zeros and not role.endswith("u")):
                found[role] = torch.zeros(shape)
            elif len(shape) == 1:
                found[role] = torch.randn(1) * 0.02 if shape == (1,) else kaiming(shape, shape[0])
            else:
                found[role] = kaiming(shape)
        return found

    def merge(self, base: Dense, p: Params, tile: Tile, product: Product) -> Dense:
        # Nothing but a whole weight comes with its bias.
        bias = None if base.bias is None else laid_on_bias(base.weight, base.bias, [(self, p)], product)
        return Dense(self.steps(p, tile, product).apply(base.weight), bias)

    def steps(self, p: Params, tile: Tile, product: Product) -> Growth:
        for role in p.keys() & {"C0", "D0", "E0"}:
            product.held(p[role], role)
        A, B = (_values(p, letter, tile, product, self.strength) for letter in "AB")
        return Growth(A, B)

    def for_bias(self) -> "OfWeight | None":
        return None if self.kinds[1:] == ("none", "none") else OfWeight(strength=self.strength)

    def spread(self, p: Params, tile: Tile) -> Tensor:
        return _spread(p, "B", tile, self.strength)

    def spread_over(self, base: Tensor, outcome: Tensor, p: Params, tile: Tile, dtype: torch.dtype) -> Tensor:  # noqa: ARG002  # as others'
        A = _values(p, "A", tile, exact_product, self.strength)
        off = _spread(p, "A", tile, self.strength) + ulp(A, dtype) / 2
        return self.spread(p, tile) + off * base.abs()

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:  # noqa: ARG002  # no dropout
        base, plain = run.base(), run.plain()
        offset = self._offset(base, p)
        if "Ad" not in p:
            return self._by_output(x, run, op, p, offset)
        A = self._scaled(p["Ad"]) @ p["Au"]  # [out, in]
        B = self._scaled(p["Bd"]), p["Bu"]
        if plain is not None and plain.weight.dtype == A.dtype == x.dtype:
            weight = torch.addmm(torch.addcmul(plain.weight, plain.weight, A), *B)
            return op.apply(x, weight, plain.bias if offset is None or plain.bias is None else plain.bias + offset)
        below, moved = run(x), base.weight * A + B[0] @ B[1]
        return below + op.apply(in_dtype_of(moved, x), moved, offset if offset is None else offset.to(moved.dtype))

    def _by_output(self, x: Tensor, run: Run, op: Op, p: Params, offset: Tensor | None) -> Tensor:
        """Where A and B are the same for all inputs, the layer's own product serves, and no other is made."""
        below, plain = run(x), run.plain()
        out = below if offset is None else below + offset
        if "A" not in p:
            return out
        if plain is None:
            own = op.apply(x, run.base().weight.to(x.dtype))
        else:
            own = below if plain.bias is None else below - plain.bias
        A, B = (self._scaled(p[letter].flatten()) for letter in "AB")  # [out], or [1]
        return out + own * A + in_dtype_of(B, x).sum(-1, keepdim=True) * B

    def _offset(self, base: Dense, p: Params) -> Tensor | None:
        """bias * D + E + W C, [out]; None where all are none."""
        parts = []
        if "D" in p:
            parts.append(p["E"] if base.bias is None else torch.addcmul(p["E"], base.bias, p["D"]))
        C = p.get("C") if "Cd" not in p else p["Cd"] @ p["Cu"]  # [in, 1]
        if C is not None:
            parts.append((base.weight.to(C.dtype) @ C).squeeze(1))
        return self._scaled(sum(parts[1:], parts[0])) if parts else None

    def _scaled(self, values: Tensor) -> Tensor:
        return values if self.strength == 1 else values * self.strength


@dataclass(frozen=True)
class OfWeight(AtStrength):
    """What becomes of the bias, as a matrix [out, 1]: the sums are of W * C, of its magnitudes, and of what W may
    make of what C is off by."""

    name = "GLoRA's bias"
    of_base = True
    couples = frozenset({"in"})

    def tensors(self, site: Site) -> Mapping[str, Spec]:  # noqa: ARG002  # they are Glora's
        return {}

    def init(self, site: Site, base: Callable[[], Dense]) -> Params:  # noqa: ARG002  # the same
        return {}

    def terms(self, base: Tensor, p: Params, tile: Tile, product: Product) -> Tensor:
        inputs = tile[1], slice(None)
        C, off = _values(p, "C", inputs, product, 1.0), _spread(p, "C", inputs, 1.0)
        moved = base * C.T
        return torch.stack([moved, moved.abs(), base.abs() * off.T.to(moved)], dim=2)  # [out, in, 3]

    def told(self, p: Params, sums: Tensor) -> Params:
        return {**p, "sums": sums}

    def merge(self, base: Dense, p: Params, tile: Tile, product: Product) -> Dense:
        step = self.steps(p, tile, product)
        assert step is not None  # the sums are told
        return base._replace(weight=step.apply(base.weight))

    def steps(self, p: Params, tile: Tile, product: Product) -> Growth | None:
        for role in p.keys() & {"C", "Cd", "Cu", "C0"}:
            product.held(p[role], role)
        rows = tile[0], slice(None)
        D, E = (_values(p, letter, rows, product, self.strength) for letter in "DE")
        if "sums" not in p:
            return None
        total, size, _ = self._sums(p, tile).unbind(2)
        return Growth(D.expand_as(total), E + total * self.strength, E.abs() + size * abs(self.strength))

    def spread(self, p: Params, tile: Tile) -> Tensor:
        # As many sums as there are inputs, in float32: half types are added up in that, and wider ones more finely.
        _, size, off = self._sums(p, tile).unbind(2)
        inputs = len(p["Cd"] if "Cd" in p else p["C"] if "C" in p else p["C0"])
        return abs(self.strength) * (off + inputs * _SINGLE * size) + _spread(p, "E", tile, self.strength)

    def spread_over(self, base: Tensor, outcome: Tensor, p: Params, tile: Tile, dtype: torch.dtype) -> Tensor:  # noqa: ARG002  # as others'
        D = _values(p, "D", (tile[0], slice(None)), exact_product, self.strength)
        off = _spread(p, "D", tile, self.strength) + ulp(D, dtype) / 2
        return self.spread(p, tile) + off * base.abs()

    def _sums(self, p: Params, tile: Tile) -> Tensor:
        """[out, 1, 3] of the tile."""
        return p["sums"][tile[0]].unsqueeze(1).to(next(iter(p.values())).device)

    def branch(self, x: Tensor, run: Run, op: Op, p: Params, training: bool) -> Tensor:  # noqa: ARG002  # Glora runs it
        return run(x)


def _values(p: Params, letter: str, tile: Tile, product: Product, strength: float) -> Tensor:
    """[n, m] of the tile, or what broadcasts over it, scaled."""
    if f"{letter}d" in p:
        return product(p[f"{letter}d"], p[f"{letter}u"], tile, strength)
    if letter not in p:
        zeros = p[f"{letter}0"]
        return product.held(zeros[tile if zeros.dim() > 1 else tile[0]], f"{letter}0").new_zeros(1, 1)
    values = product.held(p[letter], letter).view(-1, 1)
    return (values if len(values) == 1 else values[tile[0]]) * strength


def _spread(p: Params, letter: str, tile: Tile, strength: float) -> Tensor:
    """The same: how far correct ones may lie apart."""
    if f"{letter}d" not in p:  # numbers as they are held, scaled
        size = torch.zeros(1, 1) if letter not in p else p[letter].view(-1, 1)
        rows = size if len(size) == 1 else size[tile[0]]
        return exact_float64(rows).abs() * (abs(strength) * unit_of(size) * (strength != 1))
    d, u = exact_float64(p[f"{letter}d"][tile[0]]), exact_float64(p[f"{letter}u"][:, tile[1]])
    return abs(strength) * product_spread(d, u, unit_of(p[f"{letter}d"], p[f"{letter}u"]), others=1)
