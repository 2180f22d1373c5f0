"""Adapters that run: which of them, in what order, how they train, and what reads their weights."""

import copy
import errno
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import surgery
from surgery import EnvironmentFault, LoraConfig, MatchError, StateError, UsageError
from surgery.io import disk

WIDTH = 6


def _net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3))


def _with(net: nn.Module, *adapters: str, **fields: object) -> nn.Module:
    torch.manual_seed(9)
    config = {"r": 2, "target_modules": ["0", "2"], "init_lora_weights": False} | fields
    for adapter in adapters or ("default",):
        surgery.inject(net, LoraConfig(**config), adapter_name=adapter)
    return net


@pytest.fixture
def x() -> Tensor:
    return torch.linspace(-1, 1, 4 * WIDTH).view(4, WIDTH)


def _by_hand(net: nn.Module, x: Tensor, *adapters: str) -> Tensor:
    for layer in net:
        if not hasattr(layer, "fitted"):
            x = layer(x)
            continue
        out = layer.base_layer(x)
        for name in adapters:
            one = layer.fitted[name]
            out = out + one.method.scaling * (x @ one.params["A"].T @ one.params["B"].T)
        x = out
    return x


def _close(found: Tensor, wanted: Tensor, terms: int = 64) -> bool:
    """Within `terms` roundings of the largest value."""
    return bool((found - wanted).abs().max() <= terms * torch.finfo(found.dtype).eps * max(1, wanted.abs().max()))


def test_the_first_adapter_runs_and_later_ones_do_not(x: Tensor) -> None:
    net = _with(_net(), "a", "b")
    assert _close(net(x), _by_hand(net, x, "a"))
    assert not _close(net(x), _by_hand(net, x, "b"))


@pytest.mark.parametrize("chosen", ["b", ["b"], ["a", "b"], ["b", "a", "c"], []])
def test_set_adapter_runs_those_it_names(chosen: str | list[str], x: Tensor) -> None:
    net = _with(_net(), "a", "b", "c")
    surgery.set_adapter(net, chosen)
    names = [chosen] if isinstance(chosen, str) else chosen
    assert _close(net(x), _by_hand(net, x, *names))
    assert all(layer.active == tuple(names) for layer in net if hasattr(layer, "active"))


def test_switches_are_calls_and_contexts(x: Tensor) -> None:
    net = _with(_net(), "a", "b")
    alone, a, b = (_by_hand(net, x, *names) for names in ((), ("a",), ("b",)))
    with surgery.set_adapter(net, "b"):
        assert _close(net(x), b)
        with surgery.disable_adapters(net):
            assert torch.equal(net(x), alone)
            with surgery.enable_adapters(net):
                assert _close(net(x), b)
            assert torch.equal(net(x), alone)
        assert _close(net(x), b)
    assert _close(net(x), a)
    surgery.disable_adapters(net)
    surgery.set_adapter(net, ["a", "b"])
    assert torch.equal(net(x), alone)
    surgery.enable_adapters(net)
    assert _close(net(x), _by_hand(net, x, "a", "b"))


def test_a_switch_is_taken_back_after_an_error(x: Tensor) -> None:
    net = _with(_net())
    before = net(x)
    with pytest.raises(ZeroDivisionError), surgery.disable_adapters(net):
        1 / 0  # noqa: B018
    assert torch.equal(net(x), before)


SWITCHES: list[Callable[[nn.Module], object]] = [
    lambda net: surgery.set_adapter(net, "a"),
    surgery.enable_adapters,
    surgery.disable_adapters,
    surgery.merge,
    lambda net: _with(net, "fresh"),
]


@pytest.mark.parametrize("switch", SWITCHES)
def test_while_merged_nothing_is_switched_or_added(switch: Callable[[nn.Module], object], x: Tensor) -> None:
    net = surgery.merge(_with(_net(), "a", "b"))
    before, keys = net(x), list(net.state_dict())
    with pytest.raises(StateError, match="unmerge first"):
        switch(net)
    assert torch.equal(net(x), before)
    assert list(net.state_dict()) == keys


@pytest.mark.parametrize("call", [*SWITCHES[:4], surgery.unmerge, surgery.eject, lambda net: surgery.save(net, "no")])
def test_a_model_without_adapters_has_none_to_speak_of(call: Callable[[nn.Module], object]) -> None:
    with pytest.raises(StateError):
        call(_net())


@pytest.mark.parametrize("name", ["", "a.b", "a b", "../a", "ä", "forward", "weight\n", "training", "keys", "a/b"])
def test_a_name_that_cannot_be_one_is_refused(name: str) -> None:
    net = _net()
    keys = list(net.state_dict())
    with pytest.raises(UsageError, match="adapter name"):
        _with(net, name)
    assert list(net.state_dict()) == keys


def test_names_are_unique_and_known_and_stand_once() -> None:
    net = _with(_net(), "a", "b-2_C")
    with pytest.raises(StateError, match="there already"):
        _with(net, "a")
    with pytest.raises(StateError, match="b-2_C"):
        surgery.set_adapter(net, "c")
    with pytest.raises(UsageError, match="once"):
        surgery.set_adapter(net, ["a", "a"])
    assert net[0].active == ("a",)


@pytest.mark.parametrize("trainable", [True, False])
def test_training_moves_the_adapter_and_nothing_else(trainable: bool, x: Tensor) -> None:
    net = _net()
    surgery.inject(net, LoraConfig(r=2, target_modules=["0", "2"]), trainable=trainable)
    before = {name: values.clone() for name, values in net.state_dict().items()}
    moving = {name for name, values in net.named_parameters() if values.requires_grad}
    assert moving == ({name for name in before if "lora_" in name} if trainable else set())
    for _ in range(2 * trainable):  # B is zero at first, so that A moves only from the second step on
        net(x).square().sum().backward()
        torch.optim.SGD([v for v in net.parameters() if v.requires_grad], lr=0.1).step()
    assert {name for name, values in net.state_dict().items() if not torch.equal(values, before[name])} == moving


def test_dropout_acts_in_training_only(x: Tensor) -> None:
    net = _with(_net(), lora_dropout=0.5)
    steady = _by_hand(net, x, "default")
    assert _close(net.eval()(x), steady)
    assert torch.equal(net(x), net(x))
    net.train()
    assert not torch.equal(net(x), net(x))
    surgery.disable_adapters(net)
    assert torch.equal(net(x), net(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_base_keeps_its_dtype_and_the_adapter_trains_in_float32(dtype: torch.dtype, x: Tensor) -> None:
    net = _with(_net().to(dtype))
    own = [values for name, values in net.named_parameters() if "lora_" in name]
    assert {values.dtype for values in own} == {torch.float32}
    out = net(x.to(dtype))
    assert out.dtype == dtype == net[0].weight.dtype
    out.float().sum().backward()
    assert all(values.grad is not None and values.grad.abs().sum() > 0 for values in own)
    surgery.merge(net)
    assert net(x.to(dtype)).dtype == dtype


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda net: pickle.loads(pickle.dumps(net))])
@pytest.mark.parametrize("merged", [False, True])
def test_a_copy_works_and_is_its_own(copied: Callable[[nn.Module], nn.Module], merged: bool, x: Tensor) -> None:
    net = _with(_net(), "a", "b")
    bits = {name: values.clone() for name, values in _net().state_dict().items()}
    if merged:
        surgery.merge(net)
    before = net(x)
    twin = copied(net)
    assert torch.equal(twin(x), before)
    if not merged:
        with torch.no_grad():
            twin[0].fitted["a"].params["B"].add_(1)
        assert not torch.equal(twin(x), before)
        surgery.set_adapter(twin, "b")
    assert torch.equal(net(x), before)
    surgery.eject(twin)
    assert all(torch.equal(values, bits[name]) for name, values in twin.state_dict().items())
    assert torch.equal(net(x), before)


def test_weight_is_effective_and_differentiable(x: Tensor) -> None:
    net = _with(_net(), "a", "b")
    surgery.set_adapter(net, ["b", "a"])
    layer = net[0]
    assert _close(F.linear(x, layer.weight, layer.bias), layer(x))
    layer.weight.square().sum().backward()
    assert all(layer.fitted[name].params[role].grad.abs().sum() > 0 for name in "ab" for role in "AB")
    with surgery.disable_adapters(net):
        assert layer.weight is layer.base_layer.weight
    assert layer.bias is layer.base_layer.bias
    assert layer.in_features == WIDTH


def test_the_modules_put_in_hold_what_any_module_holds_and_share_none_of_it() -> None:
    net, made = _with(_net()), vars(nn.Module())
    for module in (net[0], net[0].lora_A, net[2].lora_A):
        held = vars(module)
        assert {name: type(held[name]) for name in made} == {name: type(value) for name, value in made.items()}
    assert not any(value is vars(net[2].lora_A)[name] for name, value in vars(net[0].lora_A).items() if value == {})


def test_a_model_without_its_weights_is_not_saved(tmp_path: Path) -> None:
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(4, 4))
    surgery.inject(net, surgery.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(StateError, match="0: it is on the meta device"):
        surgery.save(net, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_copy_of_another_shape_is_refused_and_nothing_changes(tmp_path: Path) -> None:
    surgery.save(_with(_net(), target_modules=["0"], modules_to_save=["2"]), tmp_path)
    other = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4, bias=False))
    told = r"2 of modules_to_save holds bias \[3\], weight \[3, 6\], and the model's weight \[4, 6\]"
    (tmp_path / "surgery.base.json").unlink()
    with pytest.raises(MatchError, match=told):
        surgery.load(other, tmp_path)
    assert type(other[2]) is nn.Linear
    assert all(values.requires_grad for values in other.parameters())


def test_a_save_over_another_adapter_that_is_cut_short_leaves_none_with_the_settings_of_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    surgery.save(_with(_net(), lora_alpha=4), tmp_path)
    rename = disk.rename

    def renamed(old: Path, new: Path) -> None:
        if new.name == "adapter_config.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(old, new)

    monkeypatch.setattr(disk, "rename", renamed)
    with pytest.raises(EnvironmentFault):
        surgery.save(_with(_net(seed=1), lora_alpha=64), tmp_path)
    with pytest.raises(surgery.AbsentError):
        surgery.load(_net(), tmp_path)


def test_a_copy_over_an_adapter_and_an_adapter_over_a_copy_are_told_by_name(tmp_path: Path) -> None:
    surgery.save(_with(_net(), target_modules=["0"], modules_to_save=["2"]), tmp_path / "copy")
    surgery.save(_with(_net(), target_modules=["2"]), tmp_path / "over")
    covered = surgery.load(_net(), tmp_path / "over")
    with pytest.raises(MatchError, match=r"^2: modules_to_save names it, and an adapter lies over it or within it"):
        surgery.load(covered, tmp_path / "copy", adapter_name="copy")
    copied = surgery.load(_net(), tmp_path / "copy")
    with pytest.raises(MatchError, match=r"^2: another adapter trains copies of it, over which none can lie"):
        surgery.load(copied, tmp_path / "over", adapter_name="over")
    with pytest.raises(MatchError, match=r"^2: another adapter trains copies of it"):
        _with(copied, "more", target_modules=["2"])
