"""A live merge: what it does to the weights, when it refuses, and what a failure leaves."""

from typing import Any

import pytest
import torch
from checkpoint_folders import tensor_hashes
from torch import Tensor, nn

import surgery
from surgery import LoraConfig, MatchError, StateError, ValueRangeError

WIDTH = 6
PARTS = ("linear1", "linear2", "self_attn.out_proj")


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3))


def _with(net: nn.Module, **fields: Any) -> nn.Module:
    torch.manual_seed(9)
    return surgery.inject(net, LoraConfig(r=2, init_lora_weights=False, **{"target_modules": ["0", "2"]} | fields))


@pytest.fixture
def x() -> Tensor:
    return torch.linspace(-1, 1, 4 * WIDTH).view(4, WIDTH)


@pytest.mark.parametrize("undo", ["index", "copy"])
def test_merge_and_unmerge_run_as_the_adapter_did_and_give_the_base_back(undo: Any, x: Tensor) -> None:
    net = _with(_net())
    before, out = tensor_hashes(net.state_dict()), net(x)
    for _ in range(2):
        assert surgery.merge(net, undo=undo) is net
        merged = net(x)
        assert (merged - out).abs().max() <= 64 * torch.finfo(torch.float32).eps * out.abs().max().clamp(min=1)
        assert {n for n, d in tensor_hashes(net.state_dict()).items() if d != before[n]} == {
            "0.base_layer.weight",
            "2.base_layer.weight",
        }
        kept = [layer.merged[0].undo.kept is not None for layer in net if getattr(layer, "merged", None)]
        assert kept == [undo == "copy"] * 2
        surgery.unmerge(net)
        assert tensor_hashes(net.state_dict()) == before
        assert torch.equal(net(x), out)


def test_training_after_a_merge_does_not_spoil_the_undo() -> None:
    net = _with(_net())
    before = tensor_hashes(_net().state_dict())
    surgery.merge(net)
    with torch.no_grad():
        for layer in (net[0], net[2]):
            layer.fitted["default"].params["A"].mul_(3)
    assert tensor_hashes(surgery.eject(net).state_dict()) == before


def test_eject_keeps_the_merged_weights_if_told(x: Tensor) -> None:
    net = _net()
    modules, flags = list(net), [True, False, True, False, True, True]
    for parameter, flag in zip(net.parameters(), flags, strict=True):
        parameter.requires_grad_(flag)
    merged = surgery.merge(_with(net))(x)
    surgery.eject(net, keep_merged=True)
    assert list(net) == modules
    assert [parameter.requires_grad for parameter in net.parameters()] == flags
    assert torch.equal(net(x), merged)
    assert not torch.equal(net(x), _net()(x))


def test_only_what_is_merged_can_be_kept() -> None:
    net = _with(_net())
    with pytest.raises(StateError, match="nothing is merged"):
        surgery.eject(net, keep_merged=True)
    with pytest.raises(StateError, match="nothing is merged"):
        surgery.unmerge(net)
    surgery.disable_adapters(net)
    with pytest.raises(StateError, match="no active adapter"):
        surgery.merge(net)


@pytest.mark.parametrize("undo", ["index", "copy"])
def test_a_weight_that_changed_since_the_merge_cannot_be_unmerged(undo: Any) -> None:
    net = surgery.merge(_with(_net()), undo=undo)
    with torch.no_grad():
        net[2].base_layer.weight[0, 0] += 1
    before = tensor_hashes(net.state_dict())
    for call in (surgery.unmerge, surgery.eject):
        with pytest.raises(StateError, match="2: its merged weight has changed"):
            call(net)
    assert tensor_hashes(net.state_dict()) == before


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, WIDTH), nn.Linear(WIDTH, 7, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize("targets", [["embed"], ["head"], ["embed", "head"]])
def test_a_tied_weight_is_not_merged(targets: list[str]) -> None:
    net = _with(Tied(), target_modules=targets)
    before = tensor_hashes(net.state_dict())
    with pytest.raises(MatchError, match="tied"):
        surgery.merge(net)
    assert tensor_hashes(net.state_dict()) == before
    surgery.eject(net)
    assert net.head.weight is net.embed.weight


@pytest.mark.parametrize("undo", ["index", "copy"])
@pytest.mark.parametrize("bad", [torch.inf, torch.nan, 3e38])
def test_a_merge_that_fails_at_the_second_layer_leaves_everything(undo: Any, bad: float, x: Tensor) -> None:
    net = _with(_net(), lora_alpha=64)
    with torch.no_grad():
        net[2].fitted["default"].params["B"][1].fill_(bad)
        net[2].fitted["default"].params["A"].fill_(1)
    before, out = tensor_hashes(net.state_dict()), net(x)
    with pytest.raises(ValueRangeError, match="2: "):
        surgery.merge(net, undo=undo)
    assert tensor_hashes(net.state_dict()) == before
    assert torch.equal(net(x), out) or bool(out.isnan().any())
    assert all(layer.merged is None for layer in (net[0], net[2]))
    surgery.set_adapter(net, "default")  # refused, were it merged
    assert tensor_hashes(surgery.eject(net).state_dict()) == tensor_hashes(_net().state_dict())


@pytest.mark.parametrize("target", PARTS)
def test_the_fast_path_of_a_transformer_layer_feels_the_adapter(target: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0).eval()
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        plain = layer(x)
    _with(layer, target_modules=[target], lora_alpha=16)
    wanted = layer(x)  # with gradients the layer calls its children
    assert wanted.requires_grad
    slow = wanted.detach()
    layer.requires_grad_(False)
    with torch.no_grad():
        fast = layer(x)
    room = 64 * torch.finfo(torch.float32).eps * float(slow.abs().max())
    assert float((fast - slow).abs().max()) <= room
    assert float((fast - plain).abs().max()) > 1000 * room
    with torch.no_grad():
        merged = surgery.merge(layer)(x)
    assert float((merged - slow).abs().max()) <= room


def test_an_undo_of_no_known_kind_is_refused() -> None:
    model = surgery.inject(torch.nn.Sequential(torch.nn.Linear(4, 4)), surgery.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(surgery.UsageError, match="undo is 'never'; index or copy is wanted"):
        surgery.merge(model, undo="never")  # type: ignore[arg-type]
