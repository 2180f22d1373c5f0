"""A linear layer and its low-rank delta as one step of autograd: what the separate steps give, and only unwatched."""

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import surgery
from surgery.core.op import FEW
from surgery.ops.low_rank import LowRank

IN, OUT, R, SCALING = 512, 6, 3, -0.5
BATCH = (4, FEW // IN // 4)
NAMES = ("x", "W", "bias", "A", "B")


def whole(*shape: int) -> Tensor:
    """Small whole numbers, whose products and sums are exact."""
    return torch.randint(-3, 4, shape).float()


def given(trained: tuple[str, ...]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    shapes = {"x": (*BATCH, IN), "W": (OUT, IN), "bias": (OUT,), "A": (R, IN), "B": (OUT, R)}
    return {name: whole(*shape).requires_grad_(name in trained) for name, shape in shapes.items()}


def separate(x: Tensor, W: Tensor, bias: Tensor | None, A: Tensor, B: Tensor) -> Tensor:
    return F.linear(x, W, bias) + SCALING * F.linear(F.linear(x, A), B)


def together(*given: Any) -> Tensor:
    return LowRank.apply(*given, SCALING)


@pytest.mark.parametrize("chosen", list(product([False, True], repeat=len(NAMES)))[1:], ids=str)
def test_it_gives_the_outcome_and_the_gradients_of_the_separate_steps(chosen: tuple[bool, ...]) -> None:
    trained = tuple(name for name, one in zip(NAMES, chosen, strict=True) if one)
    found = {}
    for way in (separate, together):
        values = given(trained)
        out = way(*values.values())
        grads = torch.autograd.grad(out, [values[name] for name in trained], whole(*out.shape).cos().round())
        found[way] = [out.detach(), *grads]
    assert all(torch.equal(one, other) for one, other in zip(found[separate], found[together], strict=True))


@pytest.mark.parametrize("bias", [False, True])
def test_its_second_derivatives_are_right(bias: bool) -> None:
    torch.manual_seed(0)
    shapes = ((2, 3, 4), (5, 4), (5,), (2, 4), (5, 2))
    values: list[Tensor | None] = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    if not bias:
        values[2] = None
    assert torch.autograd.gradcheck(together, values)
    assert torch.autograd.gradgradcheck(together, values)


def adapted() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT))
    surgery.inject(model, surgery.LoraConfig(r=R, target_modules=["0"], init_lora_weights=False))
    return model


class Counted:
    """How often the one step is taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times, apply = 0, LowRank.apply

        def counted(*given: Any) -> Any:
            self.times += 1
            return apply(*given)

        monkeypatch.setattr(LowRank, "apply", counted)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Counted:
    return Counted(monkeypatch)


def test_a_layer_that_nothing_watches_takes_it_and_a_small_input_does_not(counted: Counted) -> None:
    model = adapted()
    model(torch.randn(*BATCH, IN))
    assert counted.times == 1
    model(torch.randn(2, IN))
    assert counted.times == 1


def hooked(model: nn.Module, x: Tensor) -> object:
    seen: list[object] = []
    model[0].base_layer.register_forward_hook(lambda *given: seen.append(given))
    model(x)
    return seen


def hooked_everywhere(model: nn.Module, x: Tensor) -> object:
    seen: list[nn.Module] = []
    with nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module)):
        model(x)
    return model[0].base_layer in seen


def with_a_forward_of_its_own(model: nn.Module, x: Tensor) -> object:
    base = model[0].base_layer
    base.forward = lambda given: nn.Linear.forward(base, given) + 1000
    return bool(model(x).mean() > 500)


def under_autocast(model: nn.Module, x: Tensor) -> object:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(x).dtype == torch.bfloat16


def compiled(model: nn.Module, x: Tensor) -> object:
    return torch.compile(model, fullgraph=True, backend="aot_eager")(x).sum().backward() is None


def in_each_row(model: nn.Module, x: Tensor) -> object:
    return torch.vmap(model)(x).shape == (*BATCH, OUT)


def in_forward_mode(model: nn.Module, x: Tensor) -> object:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(x, x))).tangent is not None


def in_bfloat16(model: nn.Module, x: Tensor) -> object:
    return model.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


WATCHED: list[Callable[[nn.Module, Tensor], object]] = [
    hooked, hooked_everywhere, with_a_forward_of_its_own, under_autocast, compiled, in_each_row, in_forward_mode,
    in_bfloat16,
]  # fmt: skip


@pytest.mark.parametrize("way", WATCHED)
def test_what_looks_for_the_separate_steps_finds_them(
    way: Callable[[nn.Module, Tensor], object], counted: Counted
) -> None:
    assert way(adapted(), torch.randn(*BATCH, IN))
    assert counted.times == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputing_it_changes_no_bit_of_a_gradient(reentrant: bool, counted: Counted) -> None:
    model, x = adapted(), torch.randn(*BATCH, IN, requires_grad=True)
    found = []
    for forward in (model, lambda given: checkpoint(model, given, use_reentrant=reentrant)):
        chosen = [x, *(one for one in model.parameters() if one.requires_grad)]
        forward(x).square().sum().backward()
        found.append([one.grad for one in chosen])
        for one in chosen:
            one.grad = None
    assert counted.times == 3
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
