"""Where PEFT's LoHa and LoKr are wrong, and ours are what their formulas say."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from pairs import gradients, trained
from torch import nn

import surgery

each_kind = pytest.mark.parametrize("kind", [peft.LoHaConfig, peft.LoKrConfig])


def test_gradients_of_a_kernel_in_tuckers_form_are_those_of_the_outcome_where_pefts_are_not() -> None:
    """Those of w1_a peft makes of t2 and w2_b, and those of w2_a of t1 and w1_b."""
    x, net = torch.randn(2, 4, 6, 6).double(), nn.Sequential(nn.Conv2d(4, 6, 3)).double()
    fields: dict[str, Any] = {"target_modules": ["0"], "use_effective_conv2d": True, "init_weights": False, "r": 2}
    theirs = peft.get_peft_model(copy.deepcopy(net), peft.LoHaConfig(alpha=2, **fields)).double()
    ours = surgery.inject(net, surgery.LoHaConfig(alpha=2, **fields)).double()
    ours.load_state_dict({name.removeprefix("base_model.model."): v for name, v in theirs.state_dict().items()})
    found = []
    for model in (ours, theirs):
        model(x).square().sum().backward()
        found.append(gradients(model))
    for name, values in ours.named_parameters():
        if values.requires_grad:
            step, (mine, of_peft) = 2.0**-20, (one[name].flatten()[0] for one in found)
            sides = []
            for change in (step, -2 * step):
                with torch.no_grad():
                    values.view(-1)[0] += change
                    sides.append(ours(x).square().sum())
            with torch.no_grad():
                values.view(-1)[0] += step
            slope = (sides[0] - sides[1]) / (2 * step)
            # What rounding leaves of a difference of sums, and the third derivative times the step squared.
            room = 2.0**-20 * float(slope.abs()) + 2.0**-52 / step * float(sides[0])
            assert abs(float(mine - slope)) <= room, name
            wrong = "_a" in name
            assert (abs(float(of_peft - slope)) > 1000 * room) == wrong, name


def test_rank_dropout_that_leaves_nothing_of_a_loha_leaves_the_base_where_peft_gives_nan() -> None:
    fields: dict[str, Any] = {"target_modules": ["0"], "rank_dropout": 0.999, "init_weights": False}
    x, net = torch.randn(3, 4), nn.Sequential(nn.Linear(4, 2))
    theirs = peft.get_peft_model(copy.deepcopy(net), peft.LoHaConfig(**fields)).train()
    ours = surgery.inject(copy.deepcopy(net), surgery.LoHaConfig(**fields)).train()
    assert bool(theirs(x).isnan().all())
    assert torch.equal(ours(x), net(x))


@pytest.mark.parametrize("layer", [nn.Conv1d(12, 12, 3), nn.Conv2d(12, 12, (3, 1))], ids=["Conv1d", "Conv2d"])
def test_tuckers_form_of_rank_1_runs_where_peft_raises(layer: nn.Module, tmp_path: Path) -> None:
    fields: dict[str, Any] = {"target_modules": ["0"], "r": 1, "use_effective_conv2d": True, "init_weights": False}
    x, model = torch.randn(2, 12, 9, 4)[..., *(0,) * (4 - layer.weight.dim())], nn.Sequential(copy.deepcopy(layer))
    theirs = peft.get_peft_model(model, peft.LoKrConfig(**fields))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        theirs(x)
    ours = surgery.load(nn.Sequential(layer), tmp_path)
    p = {role: values.detach().double() for role, values in ours[0].fitted["default"].params.items()}
    w2 = torch.einsum("i j k l, i p, j r -> p r k l", p["t2"], p["w2_a"], p["w2_b"])
    delta = 8 * torch.einsum("i j, p r k l -> i p j r k l", p["w1"], w2).reshape(layer.weight.shape)
    out, wanted = ours(x).detach(), (layer.weight.double() + delta).detach()
    merged = surgery.merge(ours)[0].base_layer.weight
    # Rounded once; and the two products of w2 lie on grids of 22 bits below their largest.
    room = torch.finfo(torch.float32).eps * wanted.abs() + 2 * 2.0**-21 * delta.abs().max()
    assert bool(((merged - wanted).abs() <= room).all())
    assert float((ours(x) - out).abs().max()) <= 2 * 40 * torch.finfo(torch.float32).eps * float(out.abs().max())
    assert not torch.equal(out, layer(x))


@each_kind
def test_a_convolution_pads_as_its_layer_does_where_peft_pads_with_zeros(kind: Any, tmp_path: Path) -> None:
    """peft merges into the layer what its own forward did not compute."""
    net = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular")).eval()
    model = trained(peft.get_peft_model(copy.deepcopy(net), kind(target_modules=["0"])), 1)
    model.save_pretrained(tmp_path)
    ours, x = surgery.load(copy.deepcopy(net), tmp_path), torch.randn(2, 4, 5, 5)
    out, apart = model(x), model.merge_and_unload()(x)
    room = 2 * (4 * 9 + 2) * torch.finfo(torch.float32).eps * float(apart.abs().max())
    assert float((ours(x) - apart).abs().max()) <= room
    assert float((out - apart).abs().max()) > 1000 * room
