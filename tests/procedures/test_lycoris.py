"""LoHa and LoKr: their deltas in rational numbers, what training keeps in memory, and what is refused."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import surgery
from surgery.core.arithmetic import exact_product, on_grid
from surgery.core.op import WHOLE
from surgery.core.site import Site, TensorInfo
from surgery.hosts.recognition import op_of
from surgery.methods.loha import _Hadamard

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 8),
    "conv1d": lambda: nn.Conv1d(6, 8, 2),
    "conv2d": lambda: nn.Conv2d(6, 8, (2, 1)),
}
CONFIGS: dict[str, Any] = {
    "loha": surgery.LoHaConfig(r=3, alpha=5, use_effective_conv2d=True),
    "flat loha": surgery.LoHaConfig(r=2, alpha=0.3),
    "lokr": surgery.LoKrConfig(r=1, alpha=0.7, use_effective_conv2d=True, decompose_both=True, decompose_factor=4),
    "whole lokr": surgery.LoKrConfig(r=9, alpha=5),
    "lokr of products": surgery.LoKrConfig(r=1, alpha=-1.3),
}


def drawn(config: Any, layer: nn.Module) -> tuple[Any, Site, dict[str, Tensor]]:
    op = op_of(layer)
    assert op is not None
    site = Site("layer", {"weight": TensorInfo("layer.weight", torch.float32, tuple(layer.weight.shape))}, op)
    method = config.method("layer")
    torch.manual_seed(0)
    return method, site, {role: torch.randn(spec.shape) for role, spec in method.tensors(site).items()}


def product(B: Tensor, A: Tensor) -> Tensor:
    """Of factors on their grids, in rational numbers; float64 holds it."""
    B, A = on_grid(B, 1), on_grid(A, 0)
    found = torch.empty(len(B), A.shape[1], dtype=torch.float64)
    for i, row in enumerate(B.tolist()):
        for j, column in enumerate(A.T.tolist()):
            whole = sum(Fraction(b) * Fraction(a) for b, a in zip(row, column, strict=True))
            found[i, j] = float(whole)
            assert Fraction(float(found[i, j])) == whole
    return found


def part(p: dict[str, Tensor], one: str) -> Tensor:
    """w1 or w2, with the kernel's places as its third axis, if it has any: by the formula."""
    if f"w{one}" in p:
        whole = p[f"w{one}"].double()
        return whole.flatten(2) if whole.dim() > 2 else whole
    a, b, t = p[f"w{one}_a"], p[f"w{one}_b"], p.get(f"t{one}")
    if t is None:
        return product(a, b)
    mixed = product(a.T, t.flatten(1)).view(a.shape[1], len(b), -1)  # [out, r, places]
    return torch.stack([product(mixed[..., at], b) for at in range(mixed.shape[2])], 2)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("config", CONFIGS)
def test_a_delta_is_that_of_the_formula_in_rational_numbers(config: str, layer: str) -> None:
    method, site, p = drawn(CONFIGS[config], LAYERS[layer]())
    first, second = part(p, "1"), part(p, "2")
    wanted = torch.empty(site.shape, dtype=torch.float64)
    flat, other = first.flatten(1), second.flatten(1)
    for out, row in enumerate(wanted):
        for at in range(len(row)):
            if "loha" in config:
                one, two = flat[out, at], other[out, at]
            elif "w2" in p and site.acting.name == "convolution" and len(site.acting.kernel) == 1:
                (k, n, places), (l, m) = second.shape, first.shape  # noqa: E741
                place, channel = at % places, at // places
                one, two = first[out % l, channel % m], second[out // l, channel // m, place]
                assert (k * l, n * m * places) == site.shape
            else:
                k, n = other.shape
                one, two = first[out // k, at // n], other[out % k, at % n]
            row[at] = float(Fraction(float(one)) * Fraction(float(two)))
    found = method.delta(method.matrices(p, site), WHOLE, exact_product)
    assert torch.equal(found, wanted * method.scaling)


class _Largest(TorchDispatchMode):
    """How many numbers the largest tensor that is made has, but for views of `known`."""

    largest = 0

    def __init__(self, known: Tensor) -> None:
        super().__init__()
        self.known = known.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor) and found.untyped_storage().data_ptr() != self.known:
            self.largest = max(self.largest, found.numel())
        return found


@pytest.mark.parametrize("sizes", [(60, 84), (59, 83)], ids=str)  # the second are primes
def test_lokr_never_makes_its_delta(sizes: tuple[int, int]) -> None:
    config = surgery.LoKrConfig(r=2, init_weights=False, target_modules=["0"])
    model, x = surgery.inject(nn.Sequential(nn.Linear(*sizes)), config), torch.randn(5, sizes[0], requires_grad=True)
    with _Largest(model[0].base_weight) as seen:
        model(x).square().sum().backward()
    assert 0 < seen.largest < sizes[0] * sizes[1]


@contextmanager
def _keeping(kept: list[Tensor]) -> Iterator[None]:
    def keep(values: Tensor) -> Tensor:
        kept.append(values)
        return values

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda values: values):
        yield


def test_training_keeps_one_tensor_as_large_as_the_weight_for_a_loha() -> None:
    model = surgery.inject(nn.Sequential(nn.Linear(40, 50)), surgery.LoHaConfig(r=2, target_modules=["0"]))
    kept: list[Tensor] = []
    with _keeping(kept):
        model(torch.randn(5, 40, requires_grad=True))
    own = {values.data_ptr() for values in model.parameters()}
    assert len({one.data_ptr() for one in kept if one.numel() >= 40 * 50} - own) == 1


def test_gradients_of_the_product_are_those_of_its_outcome_and_so_are_theirs() -> None:
    torch.manual_seed(0)
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((4, 2), (2, 3), (4, 2), (2, 3))]
    assert torch.autograd.gradcheck(_Hadamard.apply, given)
    assert torch.autograd.gradgradcheck(_Hadamard.apply, given)


@pytest.mark.parametrize("kind", [surgery.LoHaConfig, surgery.LoKrConfig])
@pytest.mark.parametrize("case", ["bfloat16", "autocast"])
def test_a_small_delta_is_not_lost_beside_a_weight_in_few_bits(kind: Any, case: str) -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(16, 16, bias=False)), torch.ones(2, 16)
    nn.init.constant_(net[0].weight, 256.0)
    model = surgery.inject(net.bfloat16() if case == "bfloat16" else net, kind(target_modules=["0"]))
    delta = model[0].fitted["default"]
    for values in delta.params.values():
        values.data.fill_(0.25)
    x[:, 8:] = -1  # the base gives 0, and the delta of its first half of inputs alone would give the rest
    x[:, 0] = 0
    with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"), torch.no_grad():
        out = model(x.bfloat16() if case == "bfloat16" else x).float()
    wanted = model[0].op.apply(x, (256 + _exact(model)).float())
    assert float(_exact(model).abs().max()) < 1  # less than half a step of bfloat16 there
    assert float((out - wanted).abs().max()) <= 2.0**-8 * float(wanted.abs().max())
    assert bool((wanted + 256 != 0).all())


def _exact(model: Any) -> Tensor:
    one = model[0].fitted["default"]
    found: Tensor = one.method.delta(one.method.matrices(one.params, model[0].site), WHOLE, exact_product).detach()
    return found


@pytest.mark.parametrize(
    ("kind", "fields", "told"),
    [
        (surgery.LoHaConfig, {"r": 0}, "r is 0"),
        (surgery.LoHaConfig, {"alpha": float("nan")}, "alpha is nan"),
        (surgery.LoHaConfig, {"rank_dropout": 1.0}, r"rank_dropout is 1\.0"),
        (surgery.LoKrConfig, {"module_dropout": -0.1}, r"module_dropout is -0\.1"),
        (surgery.LoKrConfig, {"alpha_pattern": {"a": "b"}}, "alpha_pattern"),
        (surgery.LoKrConfig, {"rank_pattern": {"a": 1.5}}, "rank_pattern"),
        (surgery.LoKrConfig, {"decompose_factor": True}, "decompose_factor"),
        (surgery.LoKrConfig, {"init_weights": "zero"}, "init_weights"),
        (surgery.LoKrConfig, {"init_weights": 1}, "init_weights"),
    ],
)
def test_settings_that_cannot_be_are_refused(kind: Any, fields: dict[str, Any], told: str) -> None:
    with pytest.raises(surgery.ConfigError, match=told):
        kind(**fields)
